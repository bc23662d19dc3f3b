"""What happened in a stream: one small record for each step of a thought.

The `text` of an event is what stood in the stream for it, markers included, so the texts of all
events, joined in order, are the stream. `number` is a block's place among the finished blocks of
the stream, from 0; a block that is abandoned gives its number to the next one. `tokens` exclude
markers and are None where they are not known (yet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    text: str


class ThoughtOpened(Event):
    """`<think>`, or, with empty text, the first sign of a thought without it."""


class ThoughtText(Event):
    """Text of the thought in no block and no memento."""


class ThoughtClosed(Event):
    """`</think>`, or, with empty text, where the server ended the reasoning."""


class AnswerText(Event):
    """Text outside the thought. Before any other event it may still turn out to be a thought whose
    `<think>` stood in the prompt (`ThoughtClosed` follows)."""


class OtherMarker(Event):
    """A marker that opens and closes nothing, or chat markup."""


@dataclass(frozen=True, slots=True)
class BlockOpened(Event):
    number: int


@dataclass(frozen=True, slots=True)
class BlockText(Event):
    number: int


@dataclass(frozen=True, slots=True)
class BlockClosed(Event):
    number: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class BlockAbandoned(Event):
    """The block and its memento will never be complete (docs/semantics.md): it is not evicted."""

    number: int


@dataclass(frozen=True, slots=True)
class MementoOpened(Event):
    number: int


@dataclass(frozen=True, slots=True)
class MementoText(Event):
    number: int


@dataclass(frozen=True, slots=True)
class MementoClosed(Event):
    number: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class BlockEvicted(Event):
    """The block's KV is gone; `tokens` counts what was freed, its markers included if they go.

    Comes at the marker that triggers it where the parser was told the server's options, else at
    the end, from the server's record.
    """

    number: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Done(Event):
    """The end of the stream, always the last event.

    Attributes:
        finish_reason: as the server says; None: the stream broke off.
        prompt_tokens, output_tokens: logical tokens; None where the source does not tell.
        accounting: the server's `memento` record (docs/semantics.md); None where there is none.
        output_ids: token ids of the whole output, where the source gives them.
    """

    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    accounting: dict[str, Any] | None = None
    output_ids: tuple[int, ...] | None = None
