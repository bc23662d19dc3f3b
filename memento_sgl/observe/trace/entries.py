"""Events to what a trace is built from."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from memento_sgl.observe.sink import Event, Sink
from memento_sgl.observe.trace.build import Finished, Seen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memento_sgl.observe.trace.writer import TraceWriter
    from memento_sgl.observe.watch import Watch


class TraceSink(Sink):
    """Gives finished requests to the writer's thread."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer

    def follow(self, watch: Watch) -> TraceEntries:
        return TraceEntries(self._writer, watch)


class TraceEntries:
    """What happened to one request, in order."""

    __slots__ = ("_seen", "_watch", "_writer")

    def __init__(self, writer: TraceWriter, watch: Watch) -> None:
        self._writer = writer
        self._watch = watch
        self._seen: list[Seen] = []

    def event(self, event: Event) -> None:
        if event.kind == "place":
            return
        at, rows, before = event.logical, event.row, 0
        if (eviction := event.eviction) is not None:
            state = self._watch.state
            at, rows = state.applied - 1, state.row(eviction.resume)
            before = event.row + eviction.tokens
        self._seen.append(Seen(event.time, event.kind, at, rows, before))

    def finished(self, req: Any, record: Mapping[str, Any]) -> None:
        watch, state, stats = self._watch, self._watch.state, req.time_stats
        self._writer.put(
            Finished(
                rid=watch.rid,
                wall=watch.wall,
                arrived=watch.arrived,
                prefill_start=stats.forward_entry_time,
                first_token=stats.prefill_finished_time,
                end=perf_counter(),
                finish=req.finished_reason.to_json()["type"],
                config=state.config,
                prompt_tokens=state.prompt_len,
                cached_tokens=req.cached_tokens,
                output_tokens=len(req.output_ids_through_stop),
                blocks=tuple(state.machine.blocks),
                evictions=tuple(state.machine.evictions),
                seen=tuple(self._seen),
                record=record,
            )
        )
