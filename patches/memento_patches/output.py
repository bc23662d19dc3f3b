"""Seam: a finished request's accounting rides along with its last tokens."""

from __future__ import annotations

from typing import Any

KEY = "memento"


def after_accept(_result: None, accumulator: Any, *, req: Any) -> None:
    sent = len(accumulator.rids)
    if not sent or accumulator.rids[-1] != req.rid:
        return
    records = accumulator.customized_info.setdefault(KEY, [])
    del records[sent - 1 :]
    records.extend([] for _ in range(sent - 1 - len(records)))
    done = req.finished() and req.memento.config.enable
    record = req.memento.report(req.output_ids_through_stop) if done else None
    records.append([record] if record is not None else [])
    if record is not None and (watch := req.memento.watch) is not None:
        watch.finished(req, record)
