"""Marker strings resolved to token ids, and the class of every token the rule looks at."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol

from memento_sgl.errors import MarkerError
from memento_sgl.rule.config import MementoConfig, shown

MOST_DIGITS = 10
"""Digits of a token id."""


class TokenClass(IntEnum):
    OTHER = 0
    BLOCK_START = 1
    BLOCK_END = 2
    SUMMARY_START = 3
    SUMMARY_END = 4
    IM_START = 5
    IM_END = 6
    ASSISTANT = 7
    THINK_START = 8
    THINK_END = 9


class Tokenizer(Protocol):
    """The two methods of a Hugging Face tokenizer that are used here."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...


class MarkerIds(NamedTuple):
    """Token ids of the markers; the chat ones are None when sections are not tracked, those of the
    thought when the tokenizer has no such token."""

    block_start: int
    block_end: int
    summary_start: int
    summary_end: int
    im_start: int | None = None
    im_end: int | None = None
    assistant: int | None = None
    think_start: int | None = None
    think_end: int | None = None

    @property
    def classes(self) -> dict[int, TokenClass]:
        """Token id to class, for the tokens that are not `OTHER`; a dictionary of one's own."""
        return _classes(self).copy()


@lru_cache
def _classes(markers: MarkerIds) -> dict[int, TokenClass]:
    numbered = enumerate(markers, start=1)
    return {token: TokenClass(number) for number, token in numbered if token is not None}


def resolve_markers(
    config: MementoConfig, tokenizer: Tokenizer | None, vocabulary: int | None = None
) -> MarkerIds:
    """Find the token ids of the configured markers.

    A marker may be given as a decimal token id (`"151669"`), which needs no tokenizer. Those of the
    thought may be missing unless `constrain` is "strict".

    Args:
        vocabulary: token ids that the model has; None: not known here.

    Raises:
        MarkerError: a marker is not exactly one token, the model does not have it, or two markers
            are the same token.
    """
    names = ["block_start", "block_end", "summary_start", "summary_end"]
    if config.require_assistant_section:
        names += ["im_start", "im_end", "assistant"]
    ids: dict[str, int] = {}
    for name in [*names, "think_start", "think_end"]:
        option = f"{name}_token"
        try:
            token = _resolve(option, getattr(config, option), tokenizer)
        except MarkerError:
            if name in names or config.constrain == "strict":
                raise
            continue
        if vocabulary is not None and token >= vocabulary:
            raise MarkerError(
                f"{option}={shown(getattr(config, option))} is token id {shown(token)}, and the "
                f"model's vocabulary ends at {vocabulary - 1}: name a token that the model has"
            )
        for other, taken in ids.items():
            if taken == token:
                raise MarkerError(f"{option} and {other}_token are the same token (id {token})")
        ids[name] = token
    return MarkerIds(**ids)


def _resolve(option: str, text: str, tokenizer: Tokenizer | None) -> int:
    if text.isascii() and text.isdecimal():
        if len(text) > MOST_DIGITS:
            raise MarkerError(f"{option} is a token id of {len(text)} digits: no model has it")
        return int(text)
    if tokenizer is None:
        raise MarkerError(
            f"{option}={text!r} cannot be resolved without a tokenizer: give its token id instead"
        )
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text:
        return ids[0]
    hint = (
        "add it to the tokenizer (memento init-model does) or name the token your model uses"
        if option.startswith(("block", "summary", "think"))
        else "name the model's own, or set require_assistant_section to false if the model has no "
        "chat markup"
    )
    raise MarkerError(
        f"{option}={text!r} is not exactly one token of this tokenizer (it gives {len(ids)}: "
        f"{ids[:8]}): {hint}"
    )
