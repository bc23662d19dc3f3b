"""From SGLang's requests to what admission foresees of them, and back into its budget.

SGLang's budget is `free and evictable slots - memory_budget.total_offset`; a request comes in if
its own reservation stays below that. Both figures are replaced by those of `admission`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memento_sgl.admission.forecast import Forecast, Outlook, tokens_ahead

if TYPE_CHECKING:
    from memento_sgl.engine.runtime import Runtime

logger = logging.getLogger(__name__)


def survey(state: Runtime, adder: Any) -> None:
    """Foresee what runs and what this batch has taken in so far."""
    outlooks = [_outlook(state, r, adder.new_token_ratio) for r in unfinished(adder)]
    outlooks += [newcomer(state, r, adder.page_size) for r in adder.can_run_list]
    state.forecast = Forecast(outlooks, state.rhythm.deviation)
    adder.memory_budget.total_offset = state.forecast.peak


def unfinished(adder: Any) -> list[Any]:
    """What runs; SGLang takes finished requests out only later."""
    running = adder.running_batch
    return [req for req in running.reqs if not req.finished()] if running is not None else []


def newcomer(state: Runtime, req: Any, page: int) -> Outlook:
    """A request that has its prompt to be read yet, or the rest of it. SGLang counts a page more
    for each request, and so does this. The page in which a match ends is not there yet: the request
    takes a copy of its beginning."""
    rows, memento = req.prefix_len, req.memento
    if not req.kv.holds_kv:
        rows -= rows % page
    length = len(req.origin_input_ids) + len(req.output_ids)
    if req.to_finish is not None:  # refused: SGLang has put another prompt in place
        need = peak = length
    else:
        need, peak = memento.rows_replayed(length), memento.peak_rows(length)
    outlook = _outlook(state, req, 1.0)
    return outlook._replace(
        need=need - rows + page,
        peak_need=peak - rows + page,
        frees=None if outlook.frees is None else need - rows + page,
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
        frees=req.kv.kv_committed_len - req.kv.cache_protected_len if certain else None,
    )


def _tokens_left(req: Any) -> int:
    return max(int(req.sampling_params.max_new_tokens) - len(req.output_ids), 0)


def _clip(tokens: int) -> int:
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    return min(tokens, int(CLIP_MAX_NEW_TOKENS))


def stock_reservation(adder: Any, req: Any) -> int:
    """What `PrefillAdder.add_one_req` itself would reserve."""
    rest = len(req.full_untruncated_fill_ids) - req.prefix_len
    return int(rest + _clip(_tokens_left(req)) + adder.per_req_token_overhead)


@contextmanager
def without_simulation(req: Any) -> Iterator[None]:
    """Without a radix cache SGLang draws `ignore_eos` requests ahead as well, but not their
    evictions."""
    known = req.sampling_params.ignore_eos
    req.sampling_params.ignore_eos = known and not req.memento.config.evicts
    try:
        yield
    finally:
        req.sampling_params.ignore_eos = known


def give_up(state: Runtime, req: Any, reason: str) -> None:
    """End a request that has no row and cannot get one; its output so far goes out."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    logger.warning("%s (rid=%s)", reason, req.rid)
    req.memento.error = reason
    req.to_finish = None
    req.finished_reason = FINISH_ABORT(reason)
    state.send(req)
