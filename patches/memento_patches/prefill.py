"""Seam: the prefill policy. A prompt is prefilled in segments that end before eviction points.

One request at a time can be in the middle of its prefill; others wait or come along whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memento_sgl import runtime
from memento_sgl.eviction import evict_prefix, rows_to_next_point


def add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    allocator, tree = adder.token_to_kv_pool_allocator, adder.tree_cache
    evict_prefix(runtime.current(), req, allocator, tree)
    limit = rows_to_next_point(req)
    if limit is None:
        return original(adder, req)
    budget = adder.rem_chunk_tokens
    adder.rem_chunk_tokens = min(budget, limit)
    unfinished = original(adder, req)
    adder.rem_chunk_tokens = budget - req.extend_range.length
    return unfinished


def add_one_req(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    taken = has_chunked_req or adder.new_chunked_req is not None
    limit = rows_to_next_point(req)
    if limit is None:
        rest = len(req.full_untruncated_fill_ids) - len(req.prefix_indices)
        if adder.new_chunked_req is not None and rest > adder.rem_chunk_tokens:
            return AddReqResult.OTHER
        return original(adder, req, has_chunked_req, truncation_align_size)
    if taken:
        return AddReqResult.CONTINUE  # not now; requests without finished blocks may pass
    budget = adder.rem_chunk_tokens
    added = len(adder.can_run_list)
    adder.rem_chunk_tokens = min(budget, limit)
    outcome = original(adder, req, has_chunked_req, truncation_align_size)
    used = req.extend_range.length if len(adder.can_run_list) > added else 0
    adder.rem_chunk_tokens = budget - used
    return adder.budget_state() if used else outcome
