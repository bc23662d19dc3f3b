"""Tell a Memento model's thought from its answer, while the text arrives. Plain Python.

    <think>\\n<|block_start|> ... <|summary_end|>\\n</think>\\nThe total is 22.
             [ thought                          ]            [ content       ]

Newlines at these four borders belong to neither. Any way to cut the text into chunks gives the
same thought and the same content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

THINK = "<think>"
END_THINK = "</think>"
TOOL_CALL = "<tool_call>"


class Piece(NamedTuple):
    """Text that became known; either may be empty."""

    thought: str
    content: str


class _Phase(Enum):
    UNDECIDED = 0
    THOUGHT = 1
    ANSWER = 2


class ThoughtSplitter:
    """Splits one answer.

    A thought starts with `<think>` or a block, or was opened by the prompt, or is a mere
    `</think>`; anything else is an answer without a thought. It ends with `</think>` or, as SGLang
    reads Qwen3, with a tool call; a text that ends before is all thought.

    Args:
        block_start: the marker that opens a block.
        hidden: strings that are left out of the thought.
        think: the tags around a thought, where the model does not use these.
        opened: the prompt ends with `<think>`.
        before: text of this answer that the prompt already holds.
    """

    def __init__(
        self,
        block_start: str,
        hidden: Sequence[str] = (),
        *,
        think: tuple[str, str] = (THINK, END_THINK),
        opened: bool = False,
        before: str = "",
    ) -> None:
        self._think_start, self._think_end = think
        self._starts = (*think, block_start)
        self._tags = (self._think_end, TOOL_CALL, *hidden)
        self._tag = re.compile("|".join(map(re.escape, self._tags)))
        self._opened = opened
        self._pending = ""  # not decided yet: may become a tag
        self._newlines = ""  # end of the thought so far; dropped if nothing follows
        self._trim = not before.strip()  # at the start of the thought or content: drop newlines
        self._phase = _Phase.UNDECIDED
        if self._think_end in before:
            self._phase = _Phase.ANSWER
        elif before.strip():
            thinks = opened or any(start in before for start in self._starts)
            self._phase = _Phase.THOUGHT if thinks else _Phase.ANSWER

    @property
    def answering(self) -> bool:
        """Whether all text to come is content."""
        return self._phase is _Phase.ANSWER

    def push(self, text: str) -> Piece:
        """Take the next chunk."""
        self._pending += text
        if self._phase is _Phase.UNDECIDED:
            self._decide()
        thought = self._think() if self._phase is _Phase.THOUGHT else ""
        content = self._answer() if self._phase is _Phase.ANSWER else ""
        return Piece(thought, content)

    def close(self) -> Piece:
        """The text ended: what was held back, such as half a tag."""
        rest, self._pending = self._pending, ""
        if self.answering or (self._phase is _Phase.UNDECIDED and not self._opened):
            return Piece("", rest)
        return Piece(self._trimmed(rest), "")

    def _decide(self) -> None:
        text = self._pending.lstrip()
        if text.startswith(self._starts):
            self._pending = text.removeprefix(self._think_start)
            self._phase = _Phase.THOUGHT
        elif any(start.startswith(text) for start in self._starts):
            return
        elif self._opened:
            self._phase = _Phase.THOUGHT
        else:
            self._phase, self._trim = _Phase.ANSWER, False

    def _think(self) -> str:
        text, shown, at = self._pending, [], 0
        for match in self._tag.finditer(text):
            shown.append(text[at : match.start()])
            at = match.end()
            if match[0] in (self._think_end, TOOL_CALL):
                self._pending = text[at if match[0] == self._think_end else match.start() :]
                thought = self._trimmed("".join(shown))
                self._phase, self._trim = _Phase.ANSWER, True
                return thought
        end = len(text) - _partial(text[at:], self._tags)
        self._pending = text[end:]
        return self._trimmed("".join([*shown, text[at:end]]))

    def _trimmed(self, text: str) -> str:
        """Thought without newlines at its start, and without those at its end for now."""
        if self._trim:
            text = text.lstrip("\n")
        body = (self._newlines + text).rstrip("\n")
        self._newlines = (self._newlines + text)[len(body) :]
        self._trim = self._trim and not body
        return body

    def _answer(self) -> str:
        text, self._pending = self._pending, ""
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text


def _partial(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of a tag."""
    longest = max(map(len, tags)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0
