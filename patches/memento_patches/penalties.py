"""Seam: penalties of steps that are done again.

SGLang counts the newest token of a request with every step it prepares. Where a step is prepared
again for the same token, that would count it twice, or one step early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)

from memento_sgl.engine import runtime
from memento_sgl.engine.staging import staged

COUNTS = {
    BatchedFrequencyPenalizer: "cumulated_frequency_penalties",
    BatchedMinNewTokensPenalizer: "len_output_tokens",
    BatchedPresencePenalizer: "cumulated_presence_penalties",
    BatchedRepetitionPenalizer: "cumulated_repetition_penalties",
}
"""Where each penalty of SGLang keeps what it has counted; `[B, ...]`."""


def around_cumulate(original: Callable[..., None], batch: Any) -> None:
    reread = runtime.current().redo.reread
    rows = [i for i, req in enumerate(batch.reqs) if req in reread] if reread else []
    if not rows:
        return original(batch)
    index = staged(rows, batch.device)
    counts = [
        getattr(penalizer, COUNTS[kind])
        for kind, penalizer in batch.sampling_info.penalizer_orchestrator.penalizers.items()
        if penalizer.is_prepared()
    ]
    before = [count[index] for count in counts]
    original(batch)
    for count, old in zip(counts, before, strict=True):
        count[index] = old
