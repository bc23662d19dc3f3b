"""Trace files as one Chrome trace, for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

A process per data-parallel rank, a track per request, a counter of its KV tokens. Format: "Trace
Event Format", JSON object form; times in microseconds since the first request arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from memento_sgl.observe.trace.schema import RequestTrace

Event = dict[str, Any]

INSTANTS = {
    "void": "step done again",
    "retract": "retracted",
    "resume": "resumed",
    "replay": "evicted again",
    "abandon": "block abandoned",
}


def chrome_trace(traces: Sequence[RequestTrace]) -> dict[str, Any]:
    """The object to be written as JSON; requests in the order of their arrival."""
    ordered = sorted(traces, key=lambda trace: trace.arrived)
    begin = ordered[0].arrived if ordered else 0.0
    events: list[Event] = []
    for rank in sorted({trace.rank for trace in ordered}):
        name = {"name": f"memento, data-parallel rank {rank}"}
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": name})
    for track, trace in enumerate(ordered, start=1):
        events += _Track(trace, track, trace.arrived - begin).events()
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class _Track:
    """The events of one request. Times given to its methods are seconds since it arrived."""

    def __init__(self, trace: RequestTrace, number: int, offset: float) -> None:
        self.trace = trace
        self.number = number
        self.offset = offset

    def events(self) -> Iterator[Event]:
        trace = self.trace
        yield self._event("M", "thread_name", args={"name": trace.id})
        order = {"sort_index": self.number}
        yield self._event("M", "thread_sort_index", args=order)
        yield from self._slices()
        for eviction in trace.evictions:
            if eviction.time is not None:
                name = f"evicted {eviction.end - eviction.start} tokens"
                yield self._instant(name, eviction.time, eviction.model_dump())
        for event in trace.events:
            if event.kind in INSTANTS:
                yield self._instant(INSTANTS[event.kind], event.time, event.model_dump())
        for time, tokens in trace.kv:
            name = f"KV tokens {self.number}: {trace.id}"
            yield self._event("C", name, time, args={"tokens": tokens})

    def _slices(self) -> Iterator[Event]:
        trace, times = self.trace, self.trace.times
        sums = {**trace.tokens.model_dump(), **trace.accounting, "finish": trace.finish}
        yield self._slice(trace.id, 0.0, times.end, sums)
        start = times.prefill_start
        yield self._slice("queue", 0.0, times.end if start is None else start, {})
        if start is None:
            return
        first = times.end if times.first_token is None else times.first_token
        yield self._slice("prefill", start, first, {"tokens": trace.tokens.prompt})
        if times.first_token is None:
            return
        yield self._slice("thought", first, times.end if times.answer is None else times.answer, {})
        for block in trace.blocks:
            tokens = {"tokens": block.end - block.start - 1}
            yield from self._span("block", block.opened, block.closed, tokens)
            tokens = {"tokens": block.summary_end - block.summary_start - 1}
            yield from self._span("memento", block.summary_opened, block.summary_closed, tokens)
        if times.answer is not None:
            yield self._slice("answer", times.answer, times.end, {"tokens": trace.tokens.answer})

    def _span(
        self, name: str, start: float | None, end: float | None, args: dict[str, Any]
    ) -> Iterator[Event]:
        """A slice of what ended while the request ran; from its first token on if it began in the
        prompt."""
        if end is not None:
            first = self.trace.times.first_token or 0.0
            yield self._slice(name, first if start is None else start, end, args)

    def _slice(self, name: str, start: float, end: float, args: dict[str, Any]) -> Event:
        duration = self._micros(end) - self._micros(start)
        return self._event("X", name, start, dur=round(duration, 1), args=args)

    def _instant(self, name: str, time: float, args: dict[str, Any]) -> Event:
        return self._event("i", name, time, s="t", args=args)

    def _event(self, ph: str, name: str, time: float | None = None, **more: Any) -> Event:
        event = {"ph": ph, "name": name, "cat": "memento", "pid": self.trace.rank}
        event["tid"] = self.number
        if time is not None:
            event["ts"] = self._micros(time)
        return event | more

    def _micros(self, time: float) -> float:
        return round((self.offset + time) * 1e6, 1)
