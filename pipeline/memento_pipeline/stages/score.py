"""Stage 3: a grade for every boundary at which a block may end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from pydantic import Field

from memento_pipeline.llm.answers import parse_scores
from memento_pipeline.llm.asking import all_of, ask_items
from memento_pipeline.llm.paid import Meter, PaidLlm
from memento_pipeline.llm.prompts import score_prompt
from memento_pipeline.llm.wire import Prompt
from memento_pipeline.records import BoundaryScores, Record, Sentences, Trace


class ScoreOptions(Record):
    """`windows_per_call` windows of consecutive boundaries share one call and its instructions."""

    window: int = Field(default=16, ge=1)  # boundaries (paper)
    windows_per_call: int = Field(default=16, ge=1)
    second_window: int = Field(
        default=0, ge=0
    )  # 0: one pass; 11: the paper's second pass, averaged
    tries: int = Field(default=5, ge=1)


def calls_for(boundaries: int, options: ScoreOptions) -> int:
    """Calls of a trace with so many boundaries, when nothing has to be asked again."""
    windows = [options.window, options.second_window]
    return sum(-(-boundaries // (w * options.windows_per_call)) for w in windows if w)


def passes(boundaries: Sequence[int], options: ScoreOptions) -> list[list[Sequence[int]]]:
    """One call's boundaries each, by pass.

    Full calls first: the first call's text is the start of all later questions about the trace, and
    the more of it a prefix cache has read, the better. The second pass is divided evenly, so that
    no question of it is one of the first.
    """
    most = options.window * options.windows_per_call
    first = [boundaries[start : start + most] for start in range(0, len(boundaries), most)]
    if not options.second_window:
        return [first]
    count = -(-len(boundaries) // (options.second_window * options.windows_per_call))
    edges = [len(boundaries) * part // max(count, 1) for part in range(count + 1)]
    return [first, [boundaries[a:b] for a, b in pairwise(edges)]]


async def score_boundaries(
    trace: Trace,
    sentences: Sentences,
    forced: BoundaryScores,
    llm: PaidLlm,
    meter: Meter,
    options: ScoreOptions,
) -> BoundaryScores:
    """Ask for the boundaries that rules did not decide.

    Raises:
        AnswerError, EndpointError, StoppedError: no grade is made up, the stage is not done.
    """
    unknown = [forced.boundaries[position] for position in forced.unknown]
    graded = await all_of(
        [
            _one_pass(trace, sentences, calls, llm, meter, options)
            for calls in passes(unknown, options)
        ]
    )
    scores: list[float | None] = list(forced.scores)
    decided = list(forced.decided_by)
    for position, boundary in zip(forced.unknown, unknown, strict=True):
        grades = [grade[boundary] for grade in graded]
        scores[position] = sum(grades) / len(grades)
        decided[position] = "llm"
    return BoundaryScores(
        boundaries=forced.boundaries, scores=tuple(scores), decided_by=tuple(decided)
    )


async def _one_pass(
    trace: Trace,
    sentences: Sentences,
    calls: Sequence[Sequence[int]],
    llm: PaidLlm,
    meter: Meter,
    options: ScoreOptions,
) -> dict[int, int]:
    def prompt(wanted: Sequence[int], note: str, attempt: int) -> Prompt:
        return score_prompt(
            trace.id,
            trace.thought,
            sentences,
            wanted,
            problem=trace.problem,
            note=note,
            attempt=attempt,
        )

    ask: Any = partial(ask_items, llm, meter, tries=options.tries)
    answers = await all_of([ask(part, make_prompt=prompt, parse=parse_scores) for part in calls])
    return {item: grade for answer in answers for item, (grade, _) in answer.items()}
