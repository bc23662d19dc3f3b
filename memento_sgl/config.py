"""The options of block eviction: one model is the source of flags, JSON and request overrides.

Names and defaults follow the published reference, so that its launch JSON works unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memento_sgl.errors import ConfigError, RequestError

# Families whose training fixed whether the block delimiters are evicted too (paper, section 3).
DELIMITERS_STAY = ("qwen", "olmo")
DELIMITERS_GO = ("phi",)


class MementoConfig(BaseModel):
    """Options of a server; immutable. `docs/semantics.md` defines each one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enable: bool = Field(False, description="evict finished blocks; off is stock SGLang")
    keep_last_n_blocks: int = Field(
        0,
        ge=-1,
        description="-1: never evict; N: block j goes when the memento of block j+N closes",
    )
    mask_delimiters: bool | Literal["auto"] = Field(
        "auto",
        description="evict <|block_start|> and <|block_end|> too (Phi: true; Qwen3, OLMo 3: false; "
        "auto: by model family)",
    )
    compact_on_summary_end: bool = Field(
        True, description="evict when a memento closes; false: nothing is evicted automatically"
    )
    require_assistant_section: bool = Field(
        True, description="markers count only inside assistant turns of the chat markup"
    )
    keep_last_block_for_answer: bool = Field(
        False,
        description="a closed block goes only when the next block starts, so that the answer "
        "still sees the last one",
    )
    restart_mode: bool = Field(
        False,
        description="ablation: evict the block with its delimiters and recompute the memento's KV "
        "without it",
    )
    max_block_tokens: int = Field(
        0, ge=0, description="force <|block_end|> once a block holds this many tokens; 0: no cap"
    )
    max_summary_tokens: int = Field(
        0, ge=0, description="force <|summary_end|> once a memento holds this many; 0: no cap"
    )
    foresee_evictions: bool = Field(
        True,
        description="admission reserves what a request will hold after its evictions; false: all "
        "that it may write, as SGLang does",
    )
    debug: bool = Field(False, description="log one line per block event")
    block_start_token: str = Field("<|block_start|>", min_length=1, description="opens a block")
    block_end_token: str = Field("<|block_end|>", min_length=1, description="closes a block")
    summary_start_token: str = Field(
        "<|summary_start|>", min_length=1, description="opens a memento"
    )
    summary_end_token: str = Field("<|summary_end|>", min_length=1, description="closes a memento")
    im_start_token: str = Field("<|im_start|>", min_length=1, description="opens a chat turn")
    im_end_token: str = Field("<|im_end|>", min_length=1, description="closes a chat turn")
    assistant_token: str = Field(
        "assistant", min_length=1, description="role after im_start_token that opens a section"
    )

    @field_validator("mask_delimiters", mode="before")
    @classmethod
    def _null_is_auto(cls, value: Any) -> Any:
        return "auto" if value is None else value

    @model_validator(mode="after")
    def _contradictions(self) -> MementoConfig:
        special = [
            name for name in ("restart_mode", "keep_last_block_for_answer") if getattr(self, name)
        ]
        if len(special) == 2:
            raise ValueError("restart_mode and keep_last_block_for_answer exclude each other")
        for name in special:
            if self.keep_last_n_blocks != 0:
                raise ValueError(
                    f"{name} needs keep_last_n_blocks=0, not {self.keep_last_n_blocks}"
                )
            if not self.compact_on_summary_end:
                raise ValueError(f"{name} needs compact_on_summary_end=true")
        return self

    @property
    def evicts(self) -> bool:
        """Whether any block can ever be evicted under these options."""
        return self.enable and self.compact_on_summary_end and self.keep_last_n_blocks >= 0

    @property
    def caps(self) -> tuple[int, int]:
        """Token caps of blocks and mementos in force; 0: none."""
        if not self.enable:
            return 0, 0
        return self.max_block_tokens, self.max_summary_tokens

    @classmethod
    def parse(cls, source: str | Path | dict[str, Any]) -> MementoConfig:
        """Read options from a dict, a JSON object or the path of a JSON file.

        Raises:
            ConfigError: not JSON, not an object, unknown option, wrong type, contradiction.
        """
        data = source if isinstance(source, dict) else _load_object(str(source))
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"memento config: {explain(error, cls)}") from None

    def for_family(self, architectures: list[str]) -> MementoConfig:
        """Settle `mask_delimiters="auto"` from the model's `architectures`.

        Raises:
            ConfigError: the family is not one whose training convention is known.
        """
        if self.mask_delimiters != "auto":
            return self
        name = " ".join(architectures).lower()
        for families, value in ((DELIMITERS_STAY, False), (DELIMITERS_GO, True)):
            if any(family in name for family in families):
                return self.model_copy(update={"mask_delimiters": value})
        raise ConfigError(
            f"mask_delimiters=auto does not know the model family of {architectures}: say "
            "--memento-mask-delimiters false (delimiters stay visible, as Qwen3 and OLMo 3 are "
            "trained) or true (they are evicted with the block, as Phi is trained)"
        )

    def for_request(self, options: RequestOptions) -> MementoConfig:
        """These options with one request's overrides.

        Raises:
            RequestError: the override contradicts another option.
        """
        changes = options.model_dump(exclude={"assistant_start"}, exclude_none=True)
        if not changes:
            return self
        try:
            return MementoConfig.model_validate(self.model_dump() | changes)
        except ValidationError as error:
            raise RequestError(f"memento: {explain(error, RequestOptions)}") from None


class RequestOptions(BaseModel):
    """What one request may override: `custom_params: {"memento": {...}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enable: bool | None = None
    keep_last_n_blocks: int | None = Field(None, ge=-1)
    keep_last_block_for_answer: bool | None = None
    max_block_tokens: int | None = Field(None, ge=0)
    max_summary_tokens: int | None = Field(None, ge=0)
    assistant_start: int | None = Field(
        None,
        ge=0,
        description="logical index of the first token whose markers count, for prompts without "
        "chat markup",
    )

    @classmethod
    def parse(cls, data: Any) -> RequestOptions:
        """Validate the value of `custom_params["memento"]`; `None` means no overrides.

        Raises:
            RequestError: not an object, unknown option, wrong type or range.
        """
        if data is None:
            return cls()
        if not isinstance(data, dict):
            raise RequestError(f"memento: expected an object, got {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RequestError(f"memento: {explain(error, cls)}") from None


def _load_object(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"memento config: neither a JSON object nor a readable file: {text!r} "
                f"({error.strerror})"
            ) from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"memento config is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"memento config must be a JSON object, not {type(data).__name__}")
    return data


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for all problems of a validation error, naming the options that exist."""
    lines = []
    for problem in error.errors():
        where = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown option {where!r} (known: {', '.join(model.model_fields)})")
        else:
            lines.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    return "; ".join(dict.fromkeys(lines))
