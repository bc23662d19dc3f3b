"""Seam: the prefill policy. A prompt is prefilled in segments that end before eviction points.

One request at a time can be in the middle of its prefill; others wait or come along whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from memento_patches.classes import on_top_of
from memento_patches.overridden import overridden
from memento_sgl.admission.budget import stock_reservation, unfinished
from memento_sgl.admission.messages import too_long_message
from memento_sgl.engine import runtime
from memento_sgl.engine.eviction import evict_prefix, rows_to_next_point


class EvictingAdder(PrefillAdder):  # type: ignore[misc]
    """Ends a prefill before each eviction point and reserves what a request will hold."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        admission = runtime.current().admission
        if admission.foresees:
            admission.estimate_running(self)

    def add_chunked_req(self, req: Any) -> Any:
        admission, add = runtime.current().admission, super().add_chunked_req
        if admission.forecast is None:
            return _add_next_segment(add, self, req)
        # Its whole prompt was reserved when it came in: no budget but the memory there is.
        self.memory_budget.total_offset = 0
        rest = _add_next_segment(add, self, req)
        admission.forecast.add(admission.estimate_waiting(req, self.page_size))
        self.memory_budget.total_offset = admission.forecast.peak
        return rest

    def add_one_req(
        self, req: Any, has_chunked_req: bool, truncation_align_size: int | None
    ) -> Any:
        admission, scheduler = runtime.current().admission, runtime.current().scheduler
        arguments = (super().add_one_req, self, req, has_chunked_req, truncation_align_size)
        if admission.forecast is None:
            return _add_first_segment(*arguments)
        if self.preempt_list:
            admission.estimate_running(self)
        estimate = admission.estimate_waiting(req, self.page_size)
        alone = not (has_chunked_req or self.can_run_list or unfinished(self))
        reserved: float = estimate.peak_need
        if not alone:
            reserved = admission.forecast.peak_with(estimate) - admission.forecast.peak
        budget, sampling, added = self.memory_budget, req.sampling_params, len(self.can_run_list)
        # SGLang checks its own figure: make up for the difference meanwhile. Without a radix cache
        # it draws `ignore_eos` requests ahead as well, but not their evictions.
        offset = budget.total_offset + (reserved - stock_reservation(self, req))
        drawn = sampling.ignore_eos and not req.memento.config.evicts
        with overridden(budget, total_offset=offset), overridden(sampling, ignore_eos=drawn):
            outcome = _add_first_segment(*arguments)
        if len(self.can_run_list) > added:
            admission.forecast.add(estimate)
            budget.total_offset = admission.forecast.peak
            return self.budget_state()
        if alone and outcome is AddReqResult.NO_TOKEN:
            pool = scheduler.pool_size
            scheduler.abort(req, too_long_message(req.memento, req.output_ids, pool))
            scheduler.waiting.remove(req)
            return AddReqResult.OTHER  # not the batch is full
        return outcome


def adder_class(result: type, _scheduler: Any) -> type:
    return on_top_of(result, EvictingAdder)


def _add_next_segment(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    allocator, tree = adder.token_to_kv_pool_allocator, adder.tree_cache
    if not evict_prefix(runtime.current(), req, allocator, tree):
        adder.rem_chunk_tokens = 0  # nobody else comes in: what runs has to make room first
        return req
    limit = rows_to_next_point(req)
    if limit is None:
        return original(req)
    with overridden(adder, rem_chunk_tokens=min(adder.rem_chunk_tokens, limit)):
        rest = original(req)
    adder.rem_chunk_tokens -= req.extend_len
    return rest


def _add_first_segment(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    taken = has_chunked_req or adder.new_chunked_req is not None
    limit = rows_to_next_point(req)
    if limit is None:
        rest = len(req.full_untruncated_fill_ids) - req.prefix_len
        if taken and adder.ceil_paged_tokens(rest) > adder.rem_chunk_tokens:
            return AddReqResult.OTHER
        return original(req, has_chunked_req, truncation_align_size)
    if taken:
        return AddReqResult.CONTINUE  # not now; requests without finished blocks may pass
    added, chunk = len(adder.can_run_list), min(adder.rem_chunk_tokens, limit)
    with overridden(adder, rem_chunk_tokens=chunk), _segments_end_inside_pages(adder):
        outcome = original(req, has_chunked_req, truncation_align_size)
    used = req.extend_len if len(adder.can_run_list) > added else 0
    adder.rem_chunk_tokens -= used
    return adder.budget_state() if used else outcome


@contextmanager
def _segments_end_inside_pages(adder: Any) -> Iterator[None]:
    """Upstream cuts a first chunk at a page border, and an eviction point lies anywhere: count in
    single slots meanwhile, the rest of the page that upstream reserves for a request set aside."""
    budget, rest, added = adder.memory_budget, adder.page_size - 1, len(adder.can_run_list)
    budget.total_offset += rest
    budget.current_offset += rest
    with overridden(adder, page_size=1, per_req_token_overhead=1), overridden(budget, page_size=1):
        yield
    if len(adder.can_run_list) == added:
        budget.total_offset -= rest
        budget.current_offset -= rest
