"""Seam: penalties of steps that are done again.

SGLang counts the newest token of a request with every step it prepares. Where a step is prepared
again for the same token, that would count it twice.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.penaltylib import BatchedFrequencyPenalizer, BatchedMinNewTokensPenalizer

from memento_sgl import runtime


def after_cumulate(_result: None, batch: Any) -> None:
    """Presence and repetition do not count, so only these two have anything to take back."""
    reread = runtime.current().reread
    rows = [i for i, req in enumerate(batch.reqs) if req in reread] if reread else []
    if not rows:
        return
    penalizers = batch.sampling_info.penalizer_orchestrator.penalizers
    frequency = penalizers[BatchedFrequencyPenalizer]
    if frequency.is_prepared():
        tokens = [batch.reqs[row].output_ids[-1] for row in rows]
        frequency.cumulated_frequency_penalties[rows, tokens] -= frequency.frequency_penalties[
            rows, 0
        ]
    shortest = penalizers[BatchedMinNewTokensPenalizer]
    if shortest.is_prepared():
        shortest.len_output_tokens[rows] -= 1
