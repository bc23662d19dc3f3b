"""Seam: the prefill policy. A prompt is prefilled in segments that end before eviction points.

One request at a time can be in the middle of its prefill; others wait or come along whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memento_sgl import runtime
from memento_sgl.eviction import evict_prefix, rows_to_next_point


def around_add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
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


def around_add_one_req(
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
        if taken and adder.ceil_paged_tokens(rest) > adder.rem_chunk_tokens:
            return AddReqResult.OTHER
        return original(adder, req, has_chunked_req, truncation_align_size)
    if taken:
        return AddReqResult.CONTINUE  # not now; requests without finished blocks may pass
    budget = adder.rem_chunk_tokens
    added = len(adder.can_run_list)
    adder.rem_chunk_tokens = min(budget, limit)
    with _segments_end_inside_pages(adder):
        outcome = original(adder, req, has_chunked_req, truncation_align_size)
    used = req.extend_range.length if len(adder.can_run_list) > added else 0
    adder.rem_chunk_tokens = budget - used
    return adder.budget_state() if used else outcome


@contextmanager
def _segments_end_inside_pages(adder: Any) -> Iterator[None]:
    """Upstream cuts a first chunk at a page border, and an eviction point lies anywhere: count in
    single slots meanwhile, the rest of the page that upstream reserves for a request set aside."""
    page, added = adder.page_size, len(adder.can_run_list)
    adder.rem_total_token_offset += page - 1
    adder.cur_rem_token_offset += page - 1
    adder.page_size = 1
    try:
        yield
    finally:
        adder.page_size = page
        if len(adder.can_run_list) == added:
            adder.rem_total_token_offset -= page - 1
            adder.cur_rem_token_offset -= page - 1
