"""Seam: a finished request's accounting rides along with its last tokens.

A message is built at every step, a request finishes once: all others stay as they are, since what
is added is pickled and read again in two processes.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from memento_patches.classes import on_top_of

KEY = "memento"


class RecordingStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Adds `KEY` to a message: for each of its requests `[accounting]` or, not finished, `[]`."""

    has_additional_customized_info = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        info: dict[str, list[Any]] = super().build_additional_customized_info(reqs)
        records = [_record(req) if req.finished() else [] for req in reqs]
        return info | {KEY: records} if any(records) else info


def streamer_class(result: type, _scheduler: Any) -> type:
    return on_top_of(result, RecordingStreamer)


def _record(req: Any) -> list[dict[str, Any]]:
    """The accounting of a finished request, none where memento is off."""
    if not req.memento.config.enable:
        return []
    record = req.memento.report(req.output_ids_through_stop)
    if (watch := req.memento.watch) is not None:
        watch.finished(req, record)
    return [record]
