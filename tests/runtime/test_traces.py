"""Trace files: what is in them, how large they get, where they go, and the timeline from them."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError, DataError
from memento_sgl.observe.debug_lines import plain
from memento_sgl.observe.metrics_sink import MetricsSink
from memento_sgl.observe.observers import Observers
from memento_sgl.observe.sink import Sink
from memento_sgl.observe.trace.build import Finished, build_trace, thin_curve
from memento_sgl.observe.trace.entries import TraceSink
from memento_sgl.observe.trace.export import chrome_trace
from memento_sgl.observe.trace.schema import (
    MAX_BYTES,
    MAX_ENTRIES,
    MAX_POINTS,
    RequestTrace,
    TraceBlock,
    TraceEvent,
    TraceEviction,
    read_trace,
)
from memento_sgl.observe.trace.writer import (
    WAITING,
    TraceWriter,
    check_folder,
    file_name,
    own_files,
)
from memento_sgl.observe.watch import Watch
from memento_sgl.request.state import RequestState
from memento_sgl.rule.accounting import account
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.emission import Structure
from memento_sgl.rule.markers import MarkerIds

ROOT = Path(__file__).parents[2]
MARKERS = MarkerIds(1, 2, 3, 4, think_start=8, think_end=9)
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)


class Collector:
    """Takes what a writer would take."""

    def __init__(self) -> None:
        self.finished: list[Finished] = []

    def put(self, request: Finished) -> None:
        self.finished.append(request)


def live(
    blocks: int,
    *,
    prompt: int = 5,
    block: int = 3,
    rid: str = "r",
    retract_after: int = -1,
    metrics: Any = None,
) -> Finished:
    """A request that ran block by block, as the runtime tells its watch."""
    collector: Any = Collector()
    sinks: list[Sink] = [TraceSink(collector)]
    if metrics is not None:
        sinks.append(MetricsSink(metrics))
    observers = Observers(sinks, Structure((), ()))
    state = RequestState([0] * prompt, CONFIG, MARKERS, RequestOptions())
    state.watch = Watch(observers, rid, state)
    state.watch.placed(0, more_to_prefill=False)
    started = state.watch.arrived
    output: list[int] = [8]
    for number in range(blocks):
        for token in [1, *[0] * block, 2, 3, 0, 4]:
            output.append(token)
            if state.observe(output):
                eviction = state.apply()
                state.watch.evicted(eviction, decoding=True)
                state.watch.voided()
        if number == retract_after:
            state.watch.retracted(prompt + len(output) - 1)
            state.reset()
            state.watch.placed(4, more_to_prefill=False)
            while state.next_eviction:
                state.watch.evicted(state.apply(), decoding=False)
    output += [9, 0, 0]
    req = SimpleNamespace(
        time_stats=SimpleNamespace(forward_entry_time=started, prefill_finished_time=started),
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "stop"}),
        cached_tokens=0,
        output_ids_through_stop=output,
    )
    state.watch.finished(req, state.report(output))
    return collector.finished[0]


def trace_of(request: Finished) -> RequestTrace:
    return RequestTrace.model_validate_json(json.dumps(build_trace(request, rank=0)))


@pytest.fixture
def writer(tmp_path: Path) -> Callable[..., tuple[TraceWriter, Counter[str]]]:
    def make(folder: Path = tmp_path, most: int = 10, rank: int = 0) -> Any:
        outcomes: Counter[str] = Counter()
        return TraceWriter(folder, most, rank, lambda outcome: outcomes.update([outcome])), outcomes

    return make


def test_a_trace_agrees_with_the_accounting() -> None:
    request = live(4)
    trace = trace_of(request)
    assert trace.finish == "stop"
    assert trace.length == request.prompt_tokens + request.output_tokens
    assert [(b.start, b.end, b.summary_start, b.summary_end) for b in trace.blocks] == list(
        request.blocks
    )
    assert [(e.start, e.end) for e in trace.evictions] == request.record["evicted_spans"]
    assert max(tokens for _, tokens in trace.kv) == trace.accounting["peak_kv_tokens"]
    assert trace.kv[-1][1] == trace.accounting["final_kv_tokens"]
    assert (trace.tokens.blocks, trace.tokens.mementos, trace.tokens.answer) == (12, 4, 2)
    assert trace.counts["void"] == 4
    assert trace.every.model_dump() == {"blocks": 1, "evictions": 1, "events": 1, "kv": 1}


def test_replays_are_events_not_evictions() -> None:
    trace = trace_of(live(4, retract_after=1))
    assert len(trace.evictions) == 4
    assert trace.counts == trace.counts | {"retract": 1, "resume": 1, "replay": 2}
    replays = [event for event in trace.events if event.kind == "replay"]
    assert [event.index for event in replays] == [e.point for e in trace.evictions[:2]]
    retracted = next(event.time for event in trace.events if event.kind == "retract")
    assert (retracted, 0) in trace.kv
    lost = next(event for event in trace.events if event.kind == "retract")
    assert lost.index == trace.blocks[1].summary_end
    assert lost.rows == lost.index - sum(e.end - e.start for e in trace.evictions[:2])


class Sums(Counter[str]):
    """Stands in for `Metrics`."""

    def add(self, name: str, amount: int = 1, value: str = "") -> None:
        self[f"{name}:{value}" if value else name] += amount

    def set(self, name: str, value: float) -> None:
        self[name] = int(value)

    def observe(self, name: str, value: float) -> None:
        self[f"{name}_sum"] += value  # type: ignore[assignment]


def test_replays_are_not_counted_twice() -> None:
    sums = Sums()
    request = live(4, retract_after=1, metrics=sums)
    record = request.record
    assert sums["evictions_total:output"] == len(record["evicted_spans"]) == 4
    assert sums["evicted_tokens_total:output"] == record["evicted_tokens"] == 12
    assert (sums["row_edits_total:decode"], sums["row_edits_total:prefill"]) == (4, 2)
    assert (sums["resumptions_total"], sums["resumed_tokens_total"]) == (1, 4)
    assert sums["blocks_total:output"] == 4
    assert sums["block_tokens_sum"] == sum(record["block_tokens"])
    assert sums["saved_kv_token_steps_total"] == record["kv_auc_without"] - record["kv_auc"]
    assert sums["saved_kv_tokens"] == 0


def test_long_requests_are_thinned_and_say_so() -> None:
    request = live(3000, block=2, rid="\U0001f600" * 500)
    text = json.dumps(build_trace(request, rank=0), separators=(",", ":"))
    assert len(text) <= MAX_BYTES
    trace = RequestTrace.model_validate_json(text)
    assert trace.every.blocks == trace.every.evictions == 8
    assert trace.blocks[1].start == request.blocks[8].start
    assert len(trace.blocks) == 375
    assert trace.counts["void"] == trace.accounting["blocks"] == 3000
    assert max(tokens for _, tokens in trace.kv) == trace.accounting["peak_kv_tokens"]


def test_the_largest_possible_file_is_within_the_bound() -> None:
    """Every list full, every number as long as it can be."""
    large, late = 10**8, 123456.123456
    marks = dict.fromkeys(("opened", "closed", "summary_opened", "summary_closed"), late)
    whole = dict.fromkeys(("start", "end", "summary_start", "summary_end"), large)
    place = {"start": large, "end": large, "point": large, "resume": large}
    rows = {"time": late, "rows_before": large, "rows_after": large}
    trace = trace_of(live(2)).model_copy(
        update={
            "id": "\U0001f600" * 200,
            "blocks": [TraceBlock(**whole, **marks)] * MAX_ENTRIES,
            "evictions": [TraceEviction(**place, **rows)] * MAX_ENTRIES,
            "events": [TraceEvent(time=late, kind="abandon", index=large, rows=large)]
            * MAX_ENTRIES,
            "kv": [(late, large)] * MAX_POINTS,
        }
    )
    assert len(json.dumps(trace.model_dump(), separators=(",", ":"))) <= MAX_BYTES


def test_a_thinned_curve_keeps_its_teeth() -> None:
    points = [(float(i), i % 7) for i in range(10_000)]
    kept, step = thin_curve(points, 100)
    assert len(kept) <= 100
    assert step == 200
    assert {tokens for _, tokens in kept} == {0, 6}
    assert [time for time, _ in kept] == sorted(time for time, _ in kept)


def test_many_threads_write_whole_files(
    writer: Callable[..., tuple[TraceWriter, Counter[str]]], tmp_path: Path
) -> None:
    one, outcomes = writer(most=200)
    request = live(2)
    senders = [
        threading.Thread(target=lambda: [one.put(request) for _ in range(20)]) for _ in range(8)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    one.drain()
    assert outcomes == {"written": 160}
    files = list(tmp_path.iterdir())
    assert len(files) == 160
    assert all(read_trace(path).id == "r" for path in files)


def test_the_oldest_go_and_nothing_else(
    writer: Callable[..., tuple[TraceWriter, Counter[str]]], tmp_path: Path
) -> None:
    request = live(1)
    names = [file_name("old", wall, 0) for wall in (1.0, 2.0, 3.0)]
    others = ["mine.json", file_name("other rank", 1.0, 1), names[0] + ".bak"]
    for name in (*names, *others):
        (tmp_path / name).write_text("{}")
    two, outcomes = writer(most=3)
    two.put(request)
    two.put(request)
    two.drain()
    left = {path.name for path in tmp_path.iterdir()}
    assert set(others) < left
    assert names[2] in left
    assert not set(names[:2]) & left
    assert len(own_files(tmp_path, 0)) == 3
    assert outcomes == {"written": 2}


@pytest.mark.parametrize("rid", ["../../etc/x", "a/b\\c", ".hidden", "", "x" * 400, "\0\n"])
def test_no_request_id_leaves_the_folder(rid: str) -> None:
    name = file_name(rid, 1.5, 0)
    assert Path(name).name == name
    assert len(name) < 120
    assert name.startswith("19700101T000001.500000-r0-")
    assert name != file_name(rid, 1.5, 0)


def test_a_full_disk_is_loud_and_counted(
    writer: Callable[..., tuple[TraceWriter, Counter[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    one, outcomes = writer()
    with monkeypatch.context() as broken, caplog.at_level(logging.ERROR):
        broken.setattr("memento_sgl.observe.trace.writer.os.replace", full)
        for _ in range(3):
            one.put(live(1))
        one.drain()
    assert outcomes == {"lost": 3}
    assert [record.getMessage() for record in caplog.records] == [
        f"memento: 1 trace(s) lost: {tmp_path}: No space left on device"
    ]
    assert list(tmp_path.iterdir()) == []
    one.put(live(1))
    one.drain()
    assert outcomes == {"lost": 3, "written": 1}


def test_a_full_queue_does_not_wait(
    writer: Callable[..., tuple[TraceWriter, Counter[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(
        "memento_sgl.observe.trace.writer.build_trace", lambda *_: (gate.wait(60), {})[1]
    )
    one, outcomes = writer()
    request = live(1)
    for _ in range(WAITING + 10):
        one.put(request)
    assert outcomes["lost"] in (9, 10)  # the thread may hold one already
    gate.set()
    one.drain()
    assert outcomes["written"] + outcomes["lost"] == WAITING + 10


def test_an_error_in_one_trace_is_logged_and_the_next_is_written(
    writer: Callable[..., tuple[TraceWriter, Counter[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    one, outcomes = writer()
    one.put(None)  # type: ignore[arg-type]
    one.put(live(1))
    one.drain()
    assert outcomes == {"lost": 1, "written": 1}
    assert "a trace could not be made" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder that can be written to: Not a directory"):
        check_folder(str(tmp_path / "file" / "sub"))
    made = check_folder(str(tmp_path / "a" / "b"))
    assert made.is_dir()
    assert list(made.iterdir()) == []


def test_a_bound_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="trace_files needs trace_dir"):
        MementoConfig.parse({"trace_files": 5})


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{}", "format: Field required"), ("[1]", "should be an object"), ("{", "Invalid JSON")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is no memento trace") as caught:
        read_trace(path)
    assert reason in str(caught.value)
    with pytest.raises(DataError, match="No such file"):
        read_trace(tmp_path / "missing.json")


def test_ids_cannot_break_a_log_line() -> None:
    assert plain("chatcmpl-12:3") == "chatcmpl-12:3"
    assert "\n" not in plain("a\nmemento event=evict")
    assert plain("a b") == "'a b'"


def check_chrome(trace: dict[str, Any]) -> None:
    """The rules of the Trace Event Format for the phases that are used here."""
    assert isinstance(trace["traceEvents"], list)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    needs = {"X": {"ts", "dur"}, "i": {"ts", "s"}, "C": {"ts", "args"}, "M": {"args"}}
    open_slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} | needs[event["ph"]] <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event.get("ts", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        elif event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
        elif event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
        else:
            assert event["dur"] >= 0
            place = open_slices.setdefault((event["pid"], event["tid"]), [])
            place.append((event["ts"], event["ts"] + event["dur"]))
    for slices in open_slices.values():  # slices of a track nest or are apart
        for i, (start, end) in enumerate(slices):
            for other_start, other_end in slices[i + 1 :]:
                apart = other_start >= end - 0.2 or other_end <= start + 0.2
                inside = start - 0.2 <= other_start and other_end <= end + 0.2
                around = other_start - 0.2 <= start and end <= other_end + 0.2
                assert apart or inside or around


def test_the_timeline_is_a_chrome_trace() -> None:
    traces = [trace_of(live(3, rid="one", retract_after=1)), trace_of(live(2, rid="two"))]
    chrome = json.loads(json.dumps(chrome_trace(traces)))
    check_chrome(chrome)
    names = Counter((event["ph"], event["name"]) for event in chrome["traceEvents"])
    assert names["X", "block"] == names["X", "memento"] == 5
    assert names["X", "queue"] == names["X", "prefill"] == names["X", "thought"] == 2
    assert names["X", "answer"] == 2
    assert names["i", "evicted 3 tokens"] == names["i", "step done again"] == 5
    assert (names["i", "retracted"], names["i", "resumed"], names["i", "evicted again"]) == (
        1,
        1,
        2,
    )
    assert names["C", "KV tokens 1: one"] == len(traces[0].kv)
    tracks = {event["tid"] for event in chrome["traceEvents"] if event["ph"] == "X"}
    assert tracks == {1, 2}


def test_the_command_lists_and_exports(tmp_path: Path) -> None:
    for i, request in enumerate([live(3, rid="one"), live(2, rid="[red]two")]):
        (tmp_path / f"{i}.json").write_text(json.dumps(build_trace(request, rank=0)))
    out = tmp_path / "out" / "timeline"
    runner = CliRunner()
    result = runner.invoke(app, ["trace", str(tmp_path), "--chrome", str(out)])
    assert result.exit_code == 2
    assert "cannot be written" in result.output
    out.parent.mkdir()
    result = runner.invoke(app, ["trace", str(tmp_path), "--chrome", str(out)])
    assert result.exit_code == 0, result.output
    assert "one" in result.output
    assert "[red]two" in result.output
    check_chrome(json.loads(out.read_text()))
    result = runner.invoke(app, ["trace", str(out)])
    assert result.exit_code == 2
    assert "is no memento trace" in " ".join(result.output.split())


@pytest.mark.parametrize("columns", [40, 79, 80, 200])
def test_the_command_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    """Whole figures at every width, also of a long request."""
    trace = build_trace(live(3, rid="0123456789abcdef" * 2), rank=0)
    trace["tokens"] |= {"prompt": 12345, "output": 123456}
    trace["accounting"] |= {
        "blocks": 123, "evicted_tokens": 654321, "peak_kv_tokens": 23456,
        "peak_kv_tokens_without": 135801,
    }  # fmt: skip
    trace["times"]["end"] = 1234.567
    (tmp_path / "one.json").write_text(json.dumps(trace))
    environment = {"COLUMNS": str(columns)}
    result = CliRunner().invoke(app, ["trace", str(tmp_path / "one.json")], env=environment)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= columns
    for figure in ("12345", "123456", "123", "654321", "23456 of 135801", "1234.567", "stop"):
        assert figure in " ".join(result.output.split())


def test_the_documented_schema_is_the_models() -> None:
    documented = json.loads((ROOT / "docs" / "trace.schema.json").read_text())
    assert documented == RequestTrace.model_json_schema()


def test_the_example_in_the_docs_is_a_trace() -> None:
    page = (ROOT / "docs" / "traces.md").read_text()
    example = page.split("```json\n")[1].split("```")[0]
    trace = RequestTrace.model_validate_json(example)
    assert trace.accounting["evicted_tokens"] == sum(e.end - e.start for e in trace.evictions)
    for model in (RequestTrace, *RequestTrace.__subclasses__()):
        for name in model.model_fields:
            assert f"`{name}`" in page, name


def test_the_accounting_is_the_closed_form() -> None:
    request = live(5)
    state = RequestState([0] * 5, CONFIG, MARKERS, RequestOptions())
    tokens = [8, *[1, 0, 0, 0, 2, 3, 0, 4] * 5, 9, 0, 0]
    state.observe(tokens)
    expected = account(state.machine, 5, 5 + len(tokens)).as_dict()
    assert {k: v for k, v in expected.items() if isinstance(v, int)} == trace_of(request).accounting
