"""Seam: answers go out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from memento_patches.output import KEY

_records: dict[str, dict[str, Any]] = {}
"""Accounting by request id, from its arrival until the answer goes out."""


def take_records(manager: Any, recv_obj: Any) -> None:
    from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

    if getattr(recv_obj, "customized_info", None) is None:
        return
    info = unwrap_from_pickle(recv_obj.customized_info)
    for rid, record in zip(recv_obj.rids, info.pop(KEY, ()), strict=False):
        if record and rid in manager.rid_to_state:
            _records[rid] = record[0]
    recv_obj.customized_info = wrap_as_pickle(info) if info else None


async def add_record(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    try:
        async for answer in original(manager, obj, request):
            if (record := _records.pop(obj.rid, None)) is not None:
                answer["meta_info"][KEY] = record
            yield answer
    finally:
        _records.pop(obj.rid, None)
