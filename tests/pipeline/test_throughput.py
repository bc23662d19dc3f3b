"""1,000 traces with 200 requests in flight: the server is kept busy, memory stays flat."""

from __future__ import annotations

import gc
import resource
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from memento_pipeline.summarize import SummarizeOptions
from scenes import FAST, options, run, write_traces
from test_kill import server, stats

CONCURRENCY = 200
TRACES = 1000


def busy_share(level: list[tuple[float, int]]) -> float:
    """Mean number of requests in flight, weighted by time, over the steady part of a run: from the
    first moment with all places taken to the last."""
    full = [moment for moment, count in level if count >= CONCURRENCY]
    assert full, "the server was never full"
    steady = [(moment, count) for moment, count in level if full[0] <= moment <= full[-1]]
    area = sum(count * (after - moment) for (moment, count), (after, _) in pairwise(steady))
    span = full[-1] - full[0]
    whole = level[-1][0] - level[0][0]
    assert span > 0.6 * whole, f"only {span:.1f} of {whole:.1f} s were steady"
    return area / span / CONCURRENCY


class MemoryWatch:
    """Resident memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        page = resource.getpagesize()
        while not self._end.wait(0.1):
            self.seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)


@pytest.mark.timeout(240)
def test_200_requests_in_flight(tmp_path: Path) -> None:
    traces = write_traces(tmp_path / "traces.jsonl", TRACES, paragraphs=8)
    ask = FAST.model_copy(update={"concurrency": CONCURRENCY, "timeout": 60.0})
    gc.collect()
    rules = SummarizeOptions(rounds=1, gate_mean=0, gate_least=0)
    with server(latency=3.5, jitter=0.2) as url, MemoryWatch() as memory:
        outcome = run(options(tmp_path / "out", traces, f"{url}/v1", ask=ask, summarize=rules))
        figures = stats(url)
    assert outcome.counts["ok"] == TRACES
    assert figures["peak"] == CONCURRENCY
    share = busy_share(figures["level"])
    third = len(memory.seen) // 3
    early, late = max(memory.seen[:third]), max(memory.seen[-third:])
    megabytes = (late - early) / 2**20
    calls = figures["calls"]["all"]
    print(
        f"{calls} calls in {outcome.summary.seconds:.1f} s; {share:.1%} of the places busy; "
        f"memory grew by {megabytes:.1f} MB after the first third"
    )
    assert share >= 0.9
    assert megabytes < 20
