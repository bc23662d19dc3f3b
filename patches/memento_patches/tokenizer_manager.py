"""Seam: requests come in, answers go out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from memento_patches.output import KEY
from memento_sgl.request import check_options
from memento_sgl.serving import settings_of

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
"""Sampling parameters that constrain the output."""

_records: dict[str, dict[str, Any]] = {}
"""Accounting by request id, from its arrival until the answer goes out."""


def check_request(
    manager: Any, obj: Any, _input_text: Any, input_ids: Any = None, *_args: Any, **_kwargs: Any
) -> None:
    params = getattr(obj, "sampling_params", None)
    if not isinstance(params, dict) or input_ids is None:
        return
    settings = settings_of(manager.server_args)
    assert settings is not None
    logprobs = getattr(obj, "return_logprob", False) and obj.logprob_start_len not in (None, -1)
    grammar = any(params.get(kind) for kind in GRAMMARS) and not obj.require_reasoning
    check_options(
        params.get("custom_params"), input_ids, settings, input_logprobs=logprobs, grammar=grammar
    )


def take_records(manager: Any, recv_obj: Any) -> None:
    from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

    if getattr(recv_obj, "customized_info", None) is None:
        return
    info = unwrap_from_pickle(recv_obj.customized_info)
    for rid, record in zip(recv_obj.rids, info.pop(KEY, ()), strict=False):
        if record and rid in manager.rid_to_state:
            _records[rid] = record[0]
    recv_obj.customized_info = wrap_as_pickle(info) if info else None


def add_record(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Upstream looks the request up when this is called, before the first answer is awaited."""
    return _with_record(original(manager, obj, request), obj)


async def _with_record(answers: AsyncIterator[Any], obj: Any) -> AsyncIterator[Any]:
    try:
        async for answer in answers:
            if (record := _records.pop(obj.rid, None)) is not None:
                answer["meta_info"][KEY] = record
            yield answer
    finally:
        _records.pop(obj.rid, None)
