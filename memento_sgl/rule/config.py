"""The options of block eviction: one model is the source of flags, JSON and request overrides.

Names and defaults follow the published reference, so that its launch JSON works unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memento_sgl.errors import ConfigError, RequestError

# Families whose training fixed whether the block delimiters are evicted too (paper, section 3).
DELIMITERS_STAY = ("qwen", "olmo")
DELIMITERS_GO = ("phi",)

DELIMITERS_KEY = "memento_mask_delimiters"
"""Where `memento init-model` writes into a model's config.json what it is to be trained for."""

DEFAULT_TRACE_FILES = 1000

LARGEST = (1 << 31) - 1
"""The largest number that an option takes: device tables and SGLang's own tensors hold it."""

Emission = Literal["off", "caps", "strict"]
CAPS = ("max_block_tokens", "max_summary_tokens")
STRICT_ONLY = ("min_block_tokens", "min_summary_tokens", "max_blocks", "min_blocks")


class Limits(NamedTuple):
    """Bounds on what may be sampled, in tokens and blocks; a maximum of 0 is none."""

    min_block: int
    max_block: int
    min_summary: int
    max_summary: int
    min_blocks: int
    max_blocks: int


class MementoConfig(BaseModel):
    """Options of a server; immutable. `docs/semantics.md` defines each one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enable: bool = Field(False, description="evict finished blocks; off is stock SGLang")
    keep_last_n_blocks: int = Field(
        0,
        ge=-1,
        le=LARGEST,
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
    constrain: Emission | None = Field(
        None,
        description="off: sample freely; caps: force the closing markers at max_block_tokens and "
        "max_summary_tokens; strict: only <think>, blocks with one memento each, </think> and an "
        "answer without markers can be sampled (default: caps if a cap is set, else off)",
    )
    max_block_tokens: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="force <|block_end|> once a block holds this many tokens; 0: no cap",
    )
    max_summary_tokens: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="force <|summary_end|> once a memento holds this many; 0: no cap",
    )
    min_block_tokens: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="strict: no <|block_end|> before a block holds this many tokens",
    )
    min_summary_tokens: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="strict: no <|summary_end|> before a memento holds this many tokens",
    )
    max_blocks: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="strict: </think> after this many blocks of a thought; 0: no limit",
    )
    min_blocks: int = Field(
        0, ge=0, le=LARGEST, description="strict: no </think> before this many blocks"
    )
    foresee_evictions: bool = Field(
        True,
        description="admission reserves what a request will hold after its evictions; false: all "
        "that it may write, as SGLang does",
    )
    page: bool = Field(
        True, description="the HTTP server has a page at /memento, to watch the model think"
    )
    debug: bool = Field(False, description="log one line per block event")
    trace_dir: str = Field(
        "", description="write one file per finished request into this folder; empty: none"
    )
    trace_files: int = Field(
        DEFAULT_TRACE_FILES,
        ge=1,
        le=LARGEST,
        description="most files that each data-parallel rank keeps in trace_dir; the oldest go",
    )
    show_markers: bool = Field(
        False, description="reasoning_content keeps the block and memento markers"
    )
    block_start_token: str = Field("<|block_start|>", min_length=1, description="opens a block")
    block_end_token: str = Field("<|block_end|>", min_length=1, description="closes a block")
    summary_start_token: str = Field(
        "<|summary_start|>", min_length=1, description="opens a memento"
    )
    summary_end_token: str = Field("<|summary_end|>", min_length=1, description="closes a memento")
    im_start_token: str = Field("<|im_start|>", min_length=1, description="opens a chat turn")
    im_end_token: str = Field("<|im_end|>", min_length=1, description="closes a chat turn")
    assistant_token: str = Field(
        "assistant",
        description="role after im_start_token that opens a section, of one or several tokens; "
        "empty: im_start_token alone opens one",
    )
    section_start_tokens: str = Field(
        "", description="further tokens that open a section by themselves, with blanks between"
    )
    section_end_tokens: str = Field(
        "", description="further tokens that close one, with blanks between"
    )
    think_start_token: str = Field("<think>", min_length=1, description="opens a thought")
    think_end_token: str = Field("</think>", min_length=1, description="closes a thought")

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
        if self.trace_files != DEFAULT_TRACE_FILES and not self.trace_dir:
            raise ValueError("trace_files needs trace_dir")
        self._check_emission()
        return self

    def _check_emission(self) -> None:
        needs = {name: "strict" for name in STRICT_ONLY}
        if self.constrain == "off":
            needs |= {name: "caps or strict" for name in CAPS}
        for name, mode in needs.items():
            if getattr(self, name) and self.constrain != "strict":
                raise ValueError(f"{name} needs constrain={mode}")
        if self.constrain == "caps" and not any(getattr(self, name) for name in CAPS):
            raise ValueError(f"constrain=caps needs {' or '.join(CAPS)}")
        for what in ("block_tokens", "summary_tokens", "blocks"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if 0 < high < low:
                raise ValueError(f"min_{what}={low} is more than max_{what}={high}")

    @property
    def evicts(self) -> bool:
        """Whether any block can ever be evicted under these options."""
        return self.enable and self.compact_on_summary_end and self.keep_last_n_blocks >= 0

    @property
    def emission(self) -> Emission:
        """The mode of constrained emission in force."""
        if not self.enable:
            return "off"
        return self.constrain or ("caps" if any(self.limits) else "off")

    @property
    def limits(self) -> Limits:
        """Bounds of constrained emission."""
        return Limits(
            self.min_block_tokens,
            self.max_block_tokens,
            self.min_summary_tokens,
            self.max_summary_tokens,
            self.min_blocks,
            self.max_blocks,
        )

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

    def for_family(self, architectures: list[str], recorded: object = None) -> MementoConfig:
        """Settle `mask_delimiters="auto"` from the model's `architectures`.

        Args:
            recorded: what its config.json has under `DELIMITERS_KEY`, which counts more.

        Raises:
            ConfigError: the family is not one whose training convention is known.
        """
        if self.mask_delimiters != "auto":
            return self
        if recorded is not None:
            if not isinstance(recorded, bool):
                raise ConfigError(
                    f"config.json: {DELIMITERS_KEY} must be true or false, not {shown(recorded)}"
                )
            return self.model_copy(update={"mask_delimiters": recorded})
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
        emission = ("constrain", *CAPS, *STRICT_ONLY)
        if options.enable is False and (given := [name for name in emission if name in changes]):
            raise RequestError(
                f"memento: {given[0]} has no effect with enable=false; keep_last_n_blocks=-1 "
                "constrains without evicting"
            )
        # The server's bounds that the request's own mode does not have.
        dropped: tuple[str, ...] = ()
        if options.enable is False or options.constrain == "off":
            dropped = emission
        elif options.constrain == "caps":
            dropped = STRICT_ONLY
        base = self.model_dump(exclude=set(dropped))
        try:
            return MementoConfig.model_validate(base | changes)
        except ValidationError as error:
            raise RequestError(f"memento: {explain(error, RequestOptions)}") from None


class RequestOptions(BaseModel):
    """What one request may override: `custom_params: {"memento": {...}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enable: bool | None = None
    keep_last_n_blocks: int | None = Field(None, ge=-1, le=LARGEST)
    keep_last_block_for_answer: bool | None = None
    constrain: Emission | None = None
    max_block_tokens: int | None = Field(None, ge=0, le=LARGEST)
    max_summary_tokens: int | None = Field(None, ge=0, le=LARGEST)
    min_block_tokens: int | None = Field(None, ge=0, le=LARGEST)
    min_summary_tokens: int | None = Field(None, ge=0, le=LARGEST)
    max_blocks: int | None = Field(None, ge=0, le=LARGEST)
    min_blocks: int | None = Field(None, ge=0, le=LARGEST)
    show_markers: bool | None = None
    assistant_start: int | None = Field(
        None,
        ge=0,
        le=LARGEST,
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
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
            raise ConfigError(
                f"memento config: neither a JSON object nor a readable file: {text!r} ({reason})"
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
            lines.append(f"unknown option {shown(where)} (known: {', '.join(model.model_fields)})")
        elif problem["type"] in ("greater_than_equal", "less_than_equal"):
            lines.append(f"{where}: {problem['msg']}, not {shown(problem['input'])}")
        else:
            lines.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    return "; ".join(dict.fromkeys(lines))


def shown(value: object) -> str:
    """A value as a message may quote it, however long it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 64 else f"{text[:60]}..."
