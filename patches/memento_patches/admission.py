"""Seam: who is let in.

SGLang's budget is `free and evictable slots - rem_total_token_offset`; a request comes in if its
own reservation stays below that. Both figures are replaced by what `memento_sgl.admission` foresees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memento_patches import prefill
from memento_sgl import runtime
from memento_sgl.admission import Forecast, Outlook, tokens_ahead
from memento_sgl.limits import too_long_message
from memento_sgl.runtime import Runtime


def after_adder_init(_result: None, adder: Any, *_args: Any, **_kwargs: Any) -> None:
    state = runtime.current()
    if state.config.foresee_evictions:
        _survey(state, adder)


def around_add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    state = runtime.current()
    if state.forecast is None:
        return prefill.add_chunked_req(original, adder, req)
    # Its whole prompt was reserved when it came in: no budget but the memory there is.
    adder.rem_total_token_offset = 0
    unfinished = prefill.add_chunked_req(original, adder, req)
    state.forecast.add(_newcomer(state, req))
    adder.rem_total_token_offset = state.forecast.peak
    return unfinished


def around_add_one_req(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    state = runtime.current()
    arguments = (original, adder, req, has_chunked_req, truncation_align_size)
    if state.forecast is None:
        return prefill.add_one_req(*arguments)
    if adder.preempt_list:
        _survey(state, adder)
    newcomer = _newcomer(state, req)
    alone = not (has_chunked_req or adder.can_run_list or _unfinished(adder))
    reserved = newcomer.peak_need
    if not alone:
        reserved = state.forecast.peak_with(newcomer) - state.forecast.peak
    before, added = adder.rem_total_token_offset, len(adder.can_run_list)
    # SGLang checks its own figure: make up for the difference meanwhile.
    adder.rem_total_token_offset += reserved - _stock_reservation(adder, req)
    with _without_simulation(req):
        outcome = prefill.add_one_req(*arguments)
    adder.rem_total_token_offset = before
    if len(adder.can_run_list) > added:
        state.resumptions += req.retracted_stain and len(req.prefix_indices) > 0
        state.forecast.add(newcomer)
        adder.rem_total_token_offset = state.forecast.peak
        return adder.budget_state()
    if alone and outcome is AddReqResult.NO_TOKEN:
        state.give_up(req, too_long_message(req.memento, req.output_ids, state.pool_size))
        state.waiting.remove(req)
        return AddReqResult.OTHER  # not the batch is full
    return outcome


def _survey(state: Runtime, adder: Any) -> None:
    """Foresee what runs and what this batch has taken in so far."""
    outlooks = [_outlook(state, r, adder.new_token_ratio) for r in _unfinished(adder)]
    outlooks += [_newcomer(state, r) for r in adder.can_run_list]
    state.forecast = Forecast(outlooks, state.rhythm.deviation)
    adder.rem_total_token_offset = state.forecast.peak


def _unfinished(adder: Any) -> list[Any]:
    running = adder.running_batch
    return [req for req in running.reqs if not req.finished()] if running is not None else []


def _newcomer(state: Runtime, req: Any) -> Outlook:
    """A request that has its prompt to be read yet, or the rest of it."""
    rows, memento = len(req.prefix_indices), req.memento
    length = len(req.origin_input_ids) + len(req.output_ids)
    if req.to_finish is not None:  # refused: SGLang has put another prompt in place
        need = peak = length
    else:
        need, peak = memento.rows_replayed(length), memento.peak_rows(length)
    outlook = _outlook(state, req, 1.0)
    return outlook._replace(
        need=need - rows + 1,  # SGLang counts a page more for each request
        peak_need=peak - rows + 1,
        frees=None if outlook.frees is None else need - rows + 1,
    )


def _outlook(state: Runtime, req: Any, ratio: float) -> Outlook:
    left = _tokens_left(req)
    expected = _clip(left) * ratio
    cycle, gone = state.rhythm_of(req.memento)
    if not cycle:
        return Outlook(expected)
    opened = len(req.origin_input_ids) + len(req.output_ids) - req.memento.open_since
    certain = req.sampling_params.ignore_eos
    return Outlook(
        ahead=tokens_ahead(left, expected, cycle=cycle, opened=opened, certain=certain),
        cycle=cycle,
        gone=gone,
        opened=opened,
        kept=req.memento.blocks_kept,
        frees=req.kv_committed_len - req.cache_protected_len if certain else None,
    )


def _tokens_left(req: Any) -> int:
    return max(int(req.sampling_params.max_new_tokens) - len(req.output_ids), 0)


def _clip(tokens: int) -> int:
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    return min(tokens, int(CLIP_MAX_NEW_TOKENS))


def _stock_reservation(adder: Any, req: Any) -> int:
    rest = len(req.full_untruncated_fill_ids) - len(req.prefix_indices)
    return int(rest + _clip(_tokens_left(req)) + adder.page_size)


@contextmanager
def _without_simulation(req: Any) -> Iterator[None]:
    """Without a radix cache SGLang draws `ignore_eos` requests ahead as well, but not their
    evictions."""
    known = req.sampling_params.ignore_eos
    req.sampling_params.ignore_eos = known and not req.memento.config.evicts
    try:
        yield
    finally:
        req.sampling_params.ignore_eos = known
