"""Seam: requests and batches."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.utils import is_health_check_generate_req

from memento_sgl.cache.requests import RequestCache
from memento_sgl.engine import runtime


def after_init(_result: None, req: Any, *_args: Any, **_kwargs: Any) -> None:
    req.memento = runtime.current().new_request(req, probe=is_health_check_generate_req(req))


def after_set_finish_with_abort(_result: None, req: Any, *_args: Any, **_kwargs: Any) -> None:
    req.memento = runtime.current().without_prompt(req)


def around_refresh_fill_ids(original: Callable[..., None], req: Any) -> None:
    if req.memento.evicted == 0:
        original(req)
    else:
        req.full_untruncated_fill_ids = req.memento.row_ids(
            req.full_untruncated_fill_ids, req.origin_input_ids, req.output_ids
        )


def before_release_req(*, req: Any, tree_cache: Any, **_kwargs: Any) -> None:
    """Upstream throws a retracted request's KV away; publish it, so that it resumes from there."""
    if isinstance(tree_cache, RequestCache) and req.kv.holds_kv:
        tree_cache.cache_retracted_req(req)


def after_reset_for_retract(_result: None, req: Any) -> None:
    runtime.current().forget(req)
    if req.input_embeds is not None:  # what it wrote is dropped, and written again
        req.memento = runtime.current().new_request(req)
    # Upstream appends to the fill ids where it can; visible ones are no base for that.
    req.full_untruncated_fill_ids = array("q")


def after_prepare_for_extend(_result: None, batch: Any) -> None:
    runtime.current().place(batch)
