"""Seam: a finished request's accounting rides along with its last tokens.

A message is built at every step, a request finishes once: all others stay as they are, since what
is added is pickled and read again in two processes.
"""

from __future__ import annotations

from typing import Any

from memento_sgl import runtime

KEY = "memento"


def before_stream(_streamer: Any, reqs: list[Any], *_args: Any, **_kwargs: Any) -> None:
    runtime.current().outgoing = reqs


def before_payload(accumulator: Any, **_kwargs: Any) -> None:
    reasons = accumulator.finished_reasons
    if not any(reasons):
        return
    by_id = {req.rid: req for req in runtime.current().outgoing}
    finished = zip(accumulator.rids, reasons, strict=True)
    records = [_record(by_id[rid]) if reason else [] for rid, reason in finished]
    if any(records):
        accumulator.customized_info[KEY] = records


def _record(req: Any) -> list[dict[str, Any]]:
    """The accounting of a finished request, none where memento is off."""
    if not req.memento.config.enable:
        return []
    record = req.memento.report(req.output_ids_through_stop)
    if (watch := req.memento.watch) is not None:
        watch.finished(req, record)
    return [record]
