"""Finished traces of a store as records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from memento_pipeline.records import (
    BoundaryScores,
    Converted,
    Record,
    Segmentation,
    Sentences,
    Status,
)
from memento_pipeline.run.runner import total_usage
from memento_pipeline.run.stages import Mementos
from memento_pipeline.store.folder import Store

R = TypeVar("R", bound=Record)


def converted(
    store: Store, only: Iterable[Status] = (Status.OK, Status.FILTERED, Status.FAILED)
) -> Iterator[Converted]:
    """Traces with these statuses in input order, one at a time."""
    for trace in store.traces(only=only):
        status, reason = store.status(trace.id)
        assert status is not None
        results = store.results(trace.id)
        texts = {stage: stored.result for stage, stored in results.items()}
        made = texts.get("summarize")
        sentences = _maybe(Sentences, texts.get("split"))
        scores = _maybe(BoundaryScores, texts.get("score"))
        segmentation = _maybe(Segmentation, texts.get("segment"))
        if segmentation is not None and segmentation.finer is not None:
            sentences, scores = segmentation.finer.sentences, segmentation.finer.scores
        yield Converted(
            trace=trace,
            status=status,
            reason=reason,
            sentences=sentences,
            scores=scores,
            segmentation=segmentation,
            mementos=Mementos.model_validate_json(made).mementos if made else (),
            usage=total_usage([stored.usage for stored in results.values()]),
        )


def _maybe(kind: type[R], text: str | None) -> R | None:
    return None if text is None else kind.model_validate_json(text)
