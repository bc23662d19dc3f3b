"""From graded attempts to the figures of one way of asking (an arm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memento_frontend.evaluation.grade import Graded
from memento_frontend.evaluation.questions import EvalQuestion

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over questions and its 95 % bootstrap interval (questions drawn with replacement)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """The figures of one arm. None: nothing to take it from.

    Attributes:
        questions: with at least one attempt that ended.
        attempts, failed: attempts that ended; requests that failed (not counted as wrong).
        unreadable: attempts without an answer that can be read (counted as wrong).
        cut: attempts that ended by length.
        pass_at_1: share of right attempts, per question first.
        majority: whether the majority of a question's attempts is right.
        tokens: output tokens per attempt.
        blocks, block_tokens, memento_tokens: per attempt; means over all blocks.
        well_formed: share of attempts that stopped by themselves with all their thought in blocks,
            at least one.
        peak_kv, auc: KV tokens and token-steps per attempt; `_without`: without eviction.
    """

    questions: int
    attempts: int
    failed: int
    unreadable: int
    cut: int
    pass_at_1: Figure | None
    majority: Figure | None
    tokens: float | None
    blocks: float | None
    block_tokens: float | None
    memento_tokens: float | None
    well_formed: float | None
    peak_kv: float | None
    peak_kv_without: float | None
    auc: float | None
    auc_without: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize_arm(
    questions: Sequence[EvalQuestion],
    attempts: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: int,
    *,
    seed: int = 0,
) -> ArmSummary:
    """Grade and count.

    Args:
        attempts: by question id, the attempts that ended, as `Reasoning` records in JSON.
        failed: requests that did not.
    """
    asked = [question for question in questions if attempts.get(question.id)]
    graded = {
        q.id: Graded(q, [str(attempt["answer"]) for attempt in attempts[q.id]]) for q in asked
    }
    every = [attempt for question in asked for attempt in attempts[question.id]]
    blocks = [block for attempt in every for block in attempt["blocks"]]
    accounts = [a["accounting"] for a in every if a["accounting"] is not None]
    return ArmSummary(
        questions=len(asked),
        attempts=len(every),
        failed=failed,
        unreadable=sum(not readable for g in graded.values() for readable in g.readable),
        cut=sum(attempt["finish_reason"] == "length" for attempt in every),
        pass_at_1=_figure([float(np.mean(graded[q.id].right)) for q in asked], seed),
        majority=_figure([float(graded[q.id].majority_right) for q in asked], seed),
        tokens=_mean(attempt["output_tokens"] for attempt in every),
        blocks=_mean(len(attempt["blocks"]) for attempt in every),
        block_tokens=_mean(block["tokens"] for block in blocks),
        memento_tokens=_mean(block["memento_tokens"] for block in blocks),
        well_formed=_mean(float(_is_well_formed(attempt)) for attempt in every),
        peak_kv=_mean(account["peak_kv_tokens"] for account in accounts),
        peak_kv_without=_mean(account["peak_kv_tokens_without"] for account in accounts),
        auc=_mean(account["kv_auc"] for account in accounts),
        auc_without=_mean(account["kv_auc_without"] for account in accounts),
    )


def _is_well_formed(attempt: Mapping[str, Any]) -> bool:
    ended = attempt["finish_reason"] == "stop" and attempt["answer"] != ""
    return ended and bool(attempt["blocks"]) and not attempt["unfinished"]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _figure(values: Sequence[float], seed: int) -> Figure | None:
    if not values:
        return None
    drawn = np.random.default_rng(seed).choice(values, size=(RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return Figure(float(np.mean(values)), float(low), float(high))
