"""What one attempt at a question gave: the same type from every way of asking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Block:
    """One finished block and its memento, without their markers.

    Token counts exclude markers; None where the source does not tell.
    """

    text: str
    memento: str
    tokens: int | None = None
    memento_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A thought and its answer.

    Attributes:
        blocks: finished blocks, in order.
        answer: text after `</think>`, without markers and surrounding white space; empty if the
            thought never ended.
        unfinished: thought text in no finished block: a block or memento cut off by the end, or
            text between blocks other than white space; stripped parts, one below the other.
        finish_reason: "stop", "length" or "abort", as the server says; None: cut off by the client.
        accounting: the server's `memento` record (docs/semantics.md); None where there is none.
        prompt_tokens, output_tokens: logical tokens; None where the source does not tell.
        output_ids: token ids of the whole output, where the source gives them.
    """

    blocks: tuple[Block, ...]
    answer: str
    unfinished: str = ""
    finish_reason: str | None = None
    accounting: dict[str, Any] | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    output_ids: tuple[int, ...] | None = field(default=None, repr=False)

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        from memento_frontend.html import reasoning_html

        return reasoning_html(self)
