"""Seam: how long a request may get. Tokens are limited by the model, rows by the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memento_patches.overridden import overridden
from memento_sgl.admission.messages import outgrown_message, too_long_message
from memento_sgl.engine import runtime


def around_init_max_new_tokens(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """SGLang clips a request's length to the context and to the pool; here to the context only."""
    if not runtime.current().admission.may_exceed_pool(req):
        return original(scheduler, req)
    context = scheduler.model_config.context_len
    with overridden(scheduler, max_req_len=context - 1, max_total_num_tokens=2 * context):
        original(scheduler, req)


def around_validate_input_length(
    original: Callable[..., str | None], req: Any, max_req_input_len: int, allow_auto_truncate: bool
) -> str | None:
    """A prompt whose finished blocks make it fit is accepted."""
    state = runtime.current()
    may_exceed, length = state.admission.may_exceed_pool(req), len(req.origin_input_ids)
    most = state.scheduler.longest_prompt if may_exceed else max_req_input_len
    error = original(req, most, allow_auto_truncate)
    if len(req.origin_input_ids) < length:
        req.memento = state.new_request(req)
    if (
        may_exceed
        and error is None
        and req.memento.peak_rows(len(req.origin_input_ids)) + 1 >= state.scheduler.pool_size
    ):
        error = too_long_message(req.memento, (), state.scheduler.pool_size)
    return error


def after_retract_decode(
    result: tuple[list[Any], float, list[Any]], _batch: Any, *_args: Any
) -> tuple[list[Any], float, list[Any]] | None:
    """The last request of a batch has outgrown the pool: it ends, and what it wrote goes out."""
    state = runtime.current()
    retracted, ratio, ended = result
    if not (ended and state.admission.foresees):
        return None
    scheduler = state.scheduler
    for req in ended:
        message = outgrown_message(req.memento, req.output_ids, scheduler.pool_size)
        scheduler.abort(req, message)
    return retracted, ratio, []
