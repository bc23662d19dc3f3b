"""Markers are told together when a memento closes: nothing may be lost, doubled or out of order."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from memento_sgl.observe.debug_lines import DebugSink
from memento_sgl.observe.metrics_sink import MetricsSink
from memento_sgl.observe.observers import Observers
from memento_sgl.observe.sink import Sink
from memento_sgl.observe.trace.build import build_trace
from memento_sgl.observe.trace.entries import TraceSink
from memento_sgl.observe.watch import Watch
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.emission import Structure
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9)
CONFIG = MementoConfig(
    enable=True,
    mask_delimiters=False,
    require_assistant_section=False,
    max_block_tokens=2,
    max_summary_tokens=1,
)
CYCLE = [1, 0, 0, 2, 3, 0, 4]
"""A block of two tokens, a memento of one."""


class Log:
    """Stands in for `Metrics` and `TraceWriter`."""

    def __init__(self) -> None:
        self.totals: Counter[tuple[str, ...]] = Counter()
        self.observed: list[tuple[str, float]] = []
        self.finished: list[Any] = []

    def add(self, name: str, amount: float = 1, value: str = "") -> None:
        self.totals[name, value] += int(amount)

    def set(self, name: str, value: float) -> None:
        self.observed.append((name, value))

    def observe(self, name: str, value: float) -> None:
        self.observed.append((name, value))

    def put(self, request: Any) -> None:
        self.finished.append(request)


def followed(state: RequestState, *sinks: Sink) -> Watch:
    return Watch(Observers(sinks, Structure((), ())), "r", state)


def play(prompt: list[int], output: list[tuple[int, str]], *, at_once: bool) -> Log:
    """A request, token by token; with each token what else happens to it after that step."""
    log: Any = Log()
    state = RequestState(prompt, CONFIG, MARKERS, RequestOptions())
    sinks = [MetricsSink(log), TraceSink(log), *([DebugSink()] if at_once else [])]
    watch = state.watch = followed(state, *sinks)
    watch.placed(0, more_to_prefill=False)
    so_far: list[int] = []
    for token, also in output:
        so_far.append(token)
        if token in state.machine.classes:
            state.observe(so_far)
        while (upcoming := state.next_eviction) is not None:
            state.apply()
            watch.evicted(upcoming, decoding=True)
        if also == "void":
            state.observe(so_far)
            watch.voided()
        elif also == "retract":
            watch.retracted(len(prompt) + len(so_far) - 1)
            state.reset()
            watch.placed(len(prompt), more_to_prefill=False)
    finish(state, so_far)
    return log  # type: ignore[no-any-return]


def finish(state: RequestState, output: list[int]) -> dict[str, Any]:
    """End a request; its accounting."""
    record = state.report(output)
    ended = SimpleNamespace(
        time_stats=SimpleNamespace(forward_entry_time=0.0, prefill_finished_time=0.0),
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "length"}),
        cached_tokens=0,
        output_ids_through_stop=output,
    )
    assert state.watch is not None
    state.watch.finished(ended, record)
    return record


TOKENS = st.lists(
    st.tuples(st.sampled_from(range(10)), st.sampled_from(["", "", "", "void", "retract"])),
    max_size=12,
)


@given(
    st.sampled_from([[], CYCLE, CYCLE[:2]]),
    st.lists(st.one_of(TOKENS, st.just([(token, "") for token in CYCLE])), max_size=5),
)
def test_told_together_is_told_at_once(
    prompt: list[int], pieces: list[list[tuple[int, str]]]
) -> None:
    output = [token for piece in pieces for token in piece]
    late, early = (play(prompt, output, at_once=now) for now in (False, True))
    assert +late.totals == +early.totals
    assert late.observed == early.observed
    (mine,), (expected,) = late.finished, early.finished
    assert [seen[1:] for seen in mine.seen] == [seen[1:] for seen in expected.seen]
    times = [seen.time for seen in mine.seen]
    assert times == sorted(times)


def test_what_no_memento_follows_is_told_at_the_end() -> None:
    log = play([], [(token, "") for token in [*CYCLE, 1, 0, 0, 2, 3, 9]], at_once=False)
    (finished,) = log.finished
    kinds = [seen.kind for seen in finished.seen]
    assert kinds[-5:] == ["block_open", "forced", "block_close", "memento_open", "answer"]
    assert log.totals["forced_tokens_total", ""] == 3


def test_blocks_are_counted_as_soon_as_they_close() -> None:
    log: Any = Log()
    state = RequestState([], CONFIG, MARKERS, RequestOptions())
    state.watch = followed(state, MetricsSink(log))
    state.observe(CYCLE[:-1])
    assert log.totals["blocks_total", "output"] == 0
    state.observe(CYCLE)
    assert log.totals["blocks_total", "output"] == 1
    assert ("block_tokens", 2) in log.observed


def test_a_step_voided_before_its_eviction_is_not_in_the_curve() -> None:
    """A prefill may come between the two."""
    log: Any = Log()
    state = RequestState([], CONFIG, MARKERS, RequestOptions())
    watch = state.watch = followed(state, TraceSink(log))
    state.observe(CYCLE)
    watch.voided()
    watch.evicted(state.apply(), decoding=True)
    peak = finish(state, [*CYCLE, 0, 0])["peak_kv_tokens"]
    trace = build_trace(log.finished[0], 0)
    assert trace["counts"]["void"] == 1
    assert max(rows for _, rows in trace["kv"]) == peak
