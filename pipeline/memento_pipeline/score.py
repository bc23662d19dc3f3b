"""Stage 3: a grade for every boundary at which a block may end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field

from memento_pipeline.answers import parse_scores
from memento_pipeline.asking import all_of, ask_items
from memento_pipeline.paid import Meter, PaidLlm
from memento_pipeline.prompts import score_prompt
from memento_pipeline.records import BoundaryScores, Record, Sentences, Trace
from memento_pipeline.wire import Prompt


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


def parts(boundaries: Sequence[int], most: int) -> list[Sequence[int]]:
    """One call's boundaries each. Full ones first: the first call's text is the start of all
    later questions about the trace, and the more of it a prefix cache has read, the better."""
    return [boundaries[start : start + most] for start in range(0, len(boundaries), most)]


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
    passes = [w for w in (options.window, options.second_window) if w]
    graded = await all_of(
        [_one_pass(trace, sentences, unknown, llm, meter, options, window) for window in passes]
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
    boundaries: Sequence[int],
    llm: PaidLlm,
    meter: Meter,
    options: ScoreOptions,
    window: int,
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
    calls = parts(boundaries, window * options.windows_per_call)
    answers = await all_of([ask(part, make_prompt=prompt, parse=parse_scores) for part in calls])
    return {item: grade for answer in answers for item, (grade, _) in answer.items()}
