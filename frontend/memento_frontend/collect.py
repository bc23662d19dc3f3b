"""Events of a stream gathered into one `Reasoning`, complete or as far as it went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from memento_frontend import events as e
from memento_frontend.results import Block, Reasoning


class ReasoningBuilder:
    """Takes events one by one; `reasoning()` may be asked at any time."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._block = ""  # text of the block that is open or waits for its memento
        self._block_tokens: int | None = None
        self._memento = ""
        self._rest = [""]  # thought in no finished block, in runs
        self._answer = ""
        self._closed = False  # the thought has ended
        self._done = e.Done("")

    def add(self, event: e.Event) -> None:
        match event:
            case e.ThoughtOpened() | e.ThoughtClosed() | e.BlockOpened():
                if not self._closed:  # what looked like an answer was the thought's beginning
                    self._rest.append(self._answer)
                    self._answer = ""
                self._closed = self._closed or isinstance(event, e.ThoughtClosed)
                self._rest.append("")
            case e.ThoughtText():
                self._rest[-1] += event.text
            case e.AnswerText():
                self._answer += event.text
            case e.BlockText():
                self._block += event.text
            case e.BlockClosed():
                self._block_tokens = event.tokens
            case e.MementoText():
                self._memento += event.text
            case e.MementoClosed():
                block = Block(self._block, self._memento, self._block_tokens, event.tokens)
                self._blocks.append(block)
                self._block = self._memento = ""
            case e.BlockAbandoned():
                self._rest += [self._block, self._memento, ""]
                self._block = self._memento = ""
            case e.Done():
                self._done = event

    def reasoning(self) -> Reasoning:
        rest = [run.strip() for run in (*self._rest, self._block, self._memento)]
        done = self._done
        return Reasoning(
            blocks=tuple(_counted(self._blocks, done.accounting)),
            answer=self._answer.strip(),
            unfinished="\n".join(run for run in rest if run),
            finish_reason=done.finish_reason,
            accounting=done.accounting,
            prompt_tokens=done.prompt_tokens,
            output_tokens=done.output_tokens,
            output_ids=done.output_ids,
        )


def collect(events: Iterable[e.Event]) -> Reasoning:
    """All of a stream at once."""
    builder = ReasoningBuilder()
    for event in events:
        builder.add(event)
    return builder.reasoning()


def _counted(blocks: list[Block], record: dict[str, Any] | None) -> list[Block]:
    """The server's own counts, where it gives them. Its record begins with the prompt's blocks."""
    before = len(record["block_tokens"]) - len(blocks) if record is not None else -1
    if record is None or before < 0:
        return blocks
    sizes = zip(record["block_tokens"][before:], record["summary_tokens"][before:], strict=True)
    return [
        replace(block, tokens=tokens, memento_tokens=memento)
        for block, (tokens, memento) in zip(blocks, sizes, strict=True)
    ]
