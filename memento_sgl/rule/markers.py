"""Marker strings resolved to token ids, and the class of every token the rule looks at."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol

from memento_sgl.errors import MarkerError
from memento_sgl.rule.config import MementoConfig, shown

MOST_DIGITS = 10
"""Digits of a token id."""
MOST_TOKENS = 16
"""Tokens that a role's name may have, and further tokens that open or close a turn."""


_BLANKS = str.maketrans("▁ĠĊ", "  \n")
"""What SentencePiece and byte-level tokenizers write for white space."""
_ROLE_HINT = (
    "name the model's own (--memento-im-start-token, --memento-assistant-token, "
    "--memento-im-end-token), add these tokens to the model (memento init-model does), or set "
    "require_assistant_section to false if the model has no chat markup"
)


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
    ROLE_NAME = 10  # of a name of several tokens all but the last, which is ASSISTANT
    SECTION = 11  # opens an assistant section by itself


class Tokenizer(Protocol):
    """The two methods of a Hugging Face tokenizer that are used here."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...


class MarkerIds(NamedTuple):
    """Token ids of the markers; the chat ones are None when sections are not tracked, those of the
    thought when the tokenizer has no such token.

        <|im_start|> assistant        im_start, assistant
        <|im_start|> ass istant       im_start, role_name=(ass,), assistant=istant
        <｜Assistant｜>               im_start alone: assistant is None
    """

    block_start: int
    block_end: int
    summary_start: int
    summary_end: int
    im_start: int | None = None
    im_end: int | None = None
    assistant: int | None = None
    think_start: int | None = None
    think_end: int | None = None
    role_name: tuple[int, ...] = ()
    section_starts: tuple[int, ...] = ()
    section_ends: tuple[int, ...] = ()

    @property
    def classes(self) -> dict[int, TokenClass]:
        """Token id to class, for the tokens that are not `OTHER`; a dictionary of one's own."""
        return _classes(self).copy()

    @property
    def name(self) -> tuple[int, ...]:
        """What must follow `im_start` to open an assistant section; empty: nothing."""
        return () if self.assistant is None else (*self.role_name, self.assistant)

    @property
    def header(self) -> tuple[int, ...]:
        """What opens an assistant section; empty if sections are not tracked."""
        return () if self.im_start is None else (self.im_start, *self.name)

    def in_chat(self, tokens: Sequence[int]) -> bool:
        """Whether chat markup stands in a prompt."""
        return any(t in tokens for t in (self.im_start, *self.section_starts) if t is not None)


@lru_cache
def _classes(markers: MarkerIds) -> dict[int, TokenClass]:
    more = (
        (TokenClass.ROLE_NAME, markers.role_name),
        (TokenClass.SECTION, markers.section_starts),
        (TokenClass.IM_END, markers.section_ends),
    )
    found = {token: cls for cls, tokens in more for token in tokens}
    for number, token in enumerate(markers[: TokenClass.THINK_END], start=1):
        if isinstance(token, int):
            found[token] = TokenClass(number)
    if markers.im_start is not None and markers.assistant is None:
        found[markers.im_start] = TokenClass.SECTION
    return found


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
        names += ["im_start", "im_end"]
    ids: dict[str, int] = {}
    for name in [*names, "think_start", "think_end"]:
        option = f"{name}_token"
        try:
            token = _resolve(option, getattr(config, option), tokenizer)
        except MarkerError:
            if name in names or config.constrain == "strict":
                raise
            continue
        _check_vocabulary(option, getattr(config, option), token, vocabulary)
        for other, taken in ids.items():
            if taken == token:
                raise MarkerError(f"{option} and {other}_token are the same token (id {token})")
        ids[name] = token
    markers = MarkerIds(
        ids["block_start"],
        ids["block_end"],
        ids["summary_start"],
        ids["summary_end"],
        im_start=ids.get("im_start"),
        im_end=ids.get("im_end"),
        think_start=ids.get("think_start"),
        think_end=ids.get("think_end"),
    )
    return (
        markers if markers.im_start is None else _sections(config, markers, tokenizer, vocabulary)
    )


def _sections(
    config: MementoConfig, markers: MarkerIds, tokenizer: Tokenizer | None, vocabulary: int | None
) -> MarkerIds:
    """`markers` with what else opens or closes an assistant section."""
    name = _name(config, markers, tokenizer)
    found: dict[str, tuple[int, ...]] = {"assistant_token": name}
    for option in ("section_start_tokens", "section_end_tokens"):
        texts = getattr(config, option).split()
        if len(texts) > MOST_TOKENS:
            raise MarkerError(f"{option} names {len(texts)} tokens: at most {MOST_TOKENS}")
        found[option] = tuple(_resolve(option, text, tokenizer) for text in texts)
    taken = dict(zip(markers._fields, markers, strict=True))
    for option, tokens in found.items():
        for token in tokens:
            _check_vocabulary(option, getattr(config, option), token, vocabulary)
            for other, known in taken.items():
                if known == token:
                    raise MarkerError(f"{option} and {other}_token are the same token (id {token})")
    both = set(found["section_start_tokens"]) & {*found["section_end_tokens"], *name}
    if both or set(found["section_end_tokens"]) & set(name):
        raise MarkerError(
            "assistant_token, section_start_tokens and section_end_tokens must have no token in "
            "common"
        )
    return markers._replace(
        assistant=name[-1] if name else None,
        role_name=name[:-1],
        section_starts=found["section_start_tokens"],
        section_ends=found["section_end_tokens"],
    )


def _name(
    config: MementoConfig, markers: MarkerIds, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """The tokens of `assistant_token` as they stand behind `im_start_token`."""
    start, text = config.im_start_token, config.assistant_token
    ids: list[int]
    if all(part.isascii() and part.isdecimal() for part in text.split()):
        ids = [_resolve("assistant_token", part, None) for part in text.split()]
    elif tokenizer is None:
        ids = [_resolve("assistant_token", text, None)]
    elif _is_one(ids := list(tokenizer.encode(text, add_special_tokens=False)), text, tokenizer):
        pass
    elif not start.isdecimal():
        # Some tokenizers put a space before text that begins, and not behind a token.
        ids = list(tokenizer.encode(start + text, add_special_tokens=False))
        if ids[:1] != [markers.im_start]:
            raise MarkerError(
                f"assistant_token={shown(text)} changes the token before it, {start}: {_ROLE_HINT}"
            )
        ids = ids[1:]
    if tokenizer is not None and text.isascii() and not text.isdecimal():
        pieces = "".join(tokenizer.convert_ids_to_tokens(token) for token in ids)
        if "".join(pieces.translate(_BLANKS).split()) != "".join(text.split()):
            raise MarkerError(
                f"assistant_token={shown(text)} is not in this tokenizer (it gives {pieces!r}): "
                f"{_ROLE_HINT}"
            )
    if len(ids) > MOST_TOKENS:
        raise MarkerError(
            f"assistant_token={shown(text)} gives {len(ids)} tokens, at most {MOST_TOKENS} are "
            f"followed: {_ROLE_HINT}"
        )
    return tuple(ids)


def _check_vocabulary(option: str, text: str, token: int, vocabulary: int | None) -> None:
    if vocabulary is not None and token >= vocabulary:
        raise MarkerError(
            f"{option}={shown(text)} is token id {shown(token)}, and the model's vocabulary ends "
            f"at {vocabulary - 1}: name a token that the model has"
        )


def _is_one(ids: list[int], text: str, tokenizer: Tokenizer) -> bool:
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text


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
    if _is_one(ids, text, tokenizer):
        return ids[0]
    hint = (
        "add it to the tokenizer (memento init-model does) or name the token your model uses"
        if option.startswith(("block", "summary", "think"))
        else _ROLE_HINT
    )
    raise MarkerError(
        f"{option}={text!r} is not exactly one token of this tokenizer (it gives {len(ids)}: "
        f"{ids[:8]}): {hint}"
    )
