"""Seam: the scheduler's step loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from sglang.srt.mem_cache.registry import register_radix_cache_backend

from memento_patches.overridden import overridden
from memento_patches.plugin import install
from memento_sgl.cache.tree import RadixTree
from memento_sgl.engine import runtime
from memento_sgl.engine.eviction import evict_running
from memento_sgl.engine.integrity import check_ownership, check_ranks
from memento_sgl.environment import check_slots
from memento_sgl.serve.arguments import RADIX_BACKEND, settings_of
from memento_sgl.serve.radix import make_radix_cache
from memento_sgl.serve.reasoning_parser import register_parser


def around_init(
    original: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    settings = settings_of(server_args)
    if settings is not None:
        install("scheduler")
        runtime.install(settings)
        register_parser(settings.config)
        register_radix_cache_backend(RADIX_BACKEND, make_radix_cache)
    original(scheduler, server_args, *args, **kwargs)
    if settings is not None:
        runtime.current().attach(scheduler)


def around_decode(original: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    state = runtime.current()
    state.admission.retry.step()
    if state.redo.due:
        if stuck := evict_running(state, batch):
            _retract(stuck, scheduler, batch)
        if state.admission.ask_again():
            batch.batch_is_full = False  # slots are free, and blocks more are known
    fed = bool(state.redo.replaying)
    if fed:
        state.feed_replays(batch)
    prepared = original(scheduler, batch)
    if prepared is not None:
        state.redo.reread.clear()
    elif fed:
        state.redo.put_off()
    return prepared


def _retract(stuck: list[Any], scheduler: Any, batch: Any) -> None:
    """As SGLang does where memory runs out; it finds out only later."""
    for req in stuck:
        batch.release_req(batch.reqs.index(req), len(batch.reqs))
    batch.filter_batch(reqs_to_exclude=stuck)
    for req in stuck:
        scheduler._add_request_to_queue(req, is_retracted=True)


def between_segments(deferred: bool, scheduler: Any, running_batch: Any) -> bool:
    """SGLang's own interval between prefills knows nothing of segments.

    A decode step that finds no memory ends the last running request: what the prompt holds cannot
    be taken back. So the prompt goes on instead.
    """
    req = scheduler.chunked_req
    due: bool = runtime.current().admission.pacing.decode_next(
        more_segments=req is not None and req.memento.next_eviction is not None,
        others=not (running_batch.is_empty() or running_batch.is_prefill_only),
    )
    return deferred or (due and running_batch.check_decode_mem())


def not_voided(finishing: list[Any], _scheduler: Any, _batch: Any) -> list[Any] | None:
    """Upstream leaves out of the next step who reaches its length with the step in flight: not
    one whose step in flight is void, it would be lost."""
    voided = runtime.current().redo.voided
    return [req for req in finishing if req not in voided] if voided else None


def around_result(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> None:
    state = runtime.current()
    ignored = state.take_voided(batch) if batch.forward_mode.is_decode() else []
    if ignored:
        _process_without(ignored, original, scheduler, batch, result)
    else:
        original(scheduler, batch, result)
    state.observe(batch, ignored)
    if state.observers is not None and isinstance(scheduler.tree_cache, RadixTree):
        state.observers.read_tree(scheduler.tree_cache)
    if check_slots():
        check_ownership(scheduler)
        check_ranks(scheduler)


def _process_without(
    ignored: list[Any], original: Callable[..., Any], scheduler: Any, batch: Any, result: Any
) -> None:
    """The result loop skips retracted requests, under overlap scheduling only: look like that."""
    processor = scheduler.batch_result_processor
    if not processor.enable_overlap:
        processor = replace(processor, enable_overlap=True)
    with ExitStack() as stack:
        stack.enter_context(overridden(scheduler, batch_result_processor=processor))
        for req in ignored:
            stack.enter_context(overridden(req, is_retracted=True))
        original(scheduler, batch, result)
