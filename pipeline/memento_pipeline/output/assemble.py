"""Stage 6: blocks and mementos put together into a training row, and taken apart again.

    <think>⏎
    <|block_start|>BLOCK<|block_end|>⏎
    <|summary_start|>MEMENTO<|summary_end|>⏎
    ...
    </think>ANSWER

Between the block markers stands exactly the slice of the thought; newlines that separate stand
outside the markers. Marker-like text of the input is escaped (see `escape`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from memento_pipeline.records import Converted, Record, Row, Status
from memento_pipeline.text.escape import escape, special_count
from memento_pipeline.text.pairs import (
    BLOCK_END,
    BLOCK_START,
    SUMMARY_END,
    SUMMARY_START,
    outside,
    pairs,
)
from memento_pipeline.text.tokens import TokenCounter, count
from memento_sgl.errors import DataError

THINK, END_THINK = "<think>", "</think>"


class AssembleOptions(Record):
    """What to do with rows of more than `max_tokens` (None: no limit) tokens of response.

    "cut" keeps as many whole blocks as fit, and the answer; what does not fit with one block is
    dropped.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    too_long: Literal["drop", "cut"] = "drop"


class Assembled(NamedTuple):
    """A row, or the reason why there is none. `escaped`: places where input text was changed."""

    row: Row | None
    reason: str | None
    blocks: int
    tokens: int
    escaped: int


class Parsed(NamedTuple):
    """A response taken apart; texts are still escaped. `outside`: thought text in no block."""

    blocks: tuple[str, ...]
    mementos: tuple[str, ...]
    outside: str
    answer: str | None  # None: no `</think>`


def assemble_row(
    done: Converted, counter: TokenCounter, options: AssembleOptions | None = None
) -> Assembled:
    """The row of a converted trace.

    Raises:
        DataError: the trace is not ok, or its blocks do not cover its thought.
    """
    options = options or AssembleOptions()
    if done.status is not Status.OK or done.segmentation is None or done.sentences is None:
        raise DataError(f"trace {done.trace.id} is {done.status}: {done.reason}")
    thought = done.trace.thought
    blocks = [block.text(thought) for block in done.segmentation.blocks]
    if "".join(blocks) != thought:
        raise DataError(f"trace {done.trace.id}: its blocks do not add up to its thought")
    mementos = [memento.text.strip() for memento in done.mementos]
    answer = done.trace.answer
    kept = len(blocks)
    tokens = count(counter, _response(blocks, mementos, answer))
    if options.max_tokens is not None and tokens > options.max_tokens:
        if options.too_long == "cut":
            kept, tokens = _fitting(blocks, mementos, answer, counter, options.max_tokens)
        if options.too_long == "drop" or not kept:
            reason = f"too long: {tokens} of at most {options.max_tokens} tokens"
            return Assembled(None, reason, 0, tokens, 0)
    last = done.segmentation.blocks[kept - 1].last_sentence
    texts = [done.trace.problem, answer, *blocks[:kept], *mementos[:kept]]
    row = Row(
        problem=escape(done.trace.problem),
        response=_response(blocks[:kept], mementos[:kept], answer),
        domain=done.trace.domain,
        source=done.trace.source,
        difficulty=done.trace.difficulty,
        sentences=tuple(escape(s) for s in done.sentences.texts(thought)[: last + 1]),
        blocks=tuple((b.first_sentence, b.last_sentence) for b in done.segmentation.blocks[:kept]),
        block_summaries=tuple(escape(memento) for memento in mementos[:kept]),
    )
    return Assembled(row, None, kept, tokens, sum(map(special_count, texts)))


def parse_response(response: str) -> Parsed:
    """Blocks, mementos and answer of a response, whatever surrounds them."""
    _, opened, rest = response.partition(THINK)
    body, closing, answer = (rest if opened else response).partition(END_THINK)
    found = list(pairs(body))
    return Parsed(
        tuple(pair.block for pair in found),
        tuple(pair.memento for pair in found),
        outside(body).strip(),
        answer if closing else None,
    )


def _response(blocks: list[str], mementos: list[str], answer: str) -> str:
    thought = "".join(
        f"{BLOCK_START}{escape(block)}{BLOCK_END}\n{SUMMARY_START}{escape(memento)}{SUMMARY_END}\n"
        for block, memento in zip(blocks, mementos, strict=True)
    )
    gap = "" if not answer or answer[0].isspace() else "\n\n"
    return f"{THINK}\n{thought}{END_THINK}{gap}{escape(answer)}"


def _fitting(
    blocks: list[str], mementos: list[str], answer: str, counter: TokenCounter, most: int
) -> tuple[int, int]:
    """How many leading blocks fit (bisection), and the tokens of that response."""
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high + 1) // 2
        if count(counter, _response(blocks[:middle], mementos[:middle], answer)) <= most:
            low = middle
        else:
            high = middle - 1
    shown = max(low, 1)
    return low, count(counter, _response(blocks[:shown], mementos[:shown], answer))
