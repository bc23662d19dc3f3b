"""1,000 traces with 200 requests in flight: the server is kept busy, memory stays flat."""

from __future__ import annotations

import gc
import resource
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from memento_pipeline.stages.summarize import SummarizeOptions
from scenes import FAST, options, run, server_process, stats, write_traces

CONCURRENCY = 200
TRACES = 1000
FEWER = 250  # the run that the memory of the full one is compared with


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
    """The most resident memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        self.peak = 0
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
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.peak = max(self.peak, resident)


def measured(folder: Path, count: int, latency: float) -> tuple[dict[str, Any], float, int]:
    """The server's statistics, seconds, and this process's peak memory of one run."""
    traces = write_traces(folder / f"{count}.jsonl", count, paragraphs=8)
    ask = FAST.model_copy(update={"concurrency": CONCURRENCY, "timeout": 60.0})
    rules = SummarizeOptions(rounds=1, gate_mean=0, gate_least=0)
    gc.collect()
    with server_process(latency=latency, jitter=0.2) as url, MemoryWatch() as memory:
        wanted = options(folder / f"{count}", traces, f"{url}/v1", ask=ask, summarize=rules)
        outcome = run(wanted)
        assert outcome.counts["ok"] == count
        return stats(url), outcome.summary.seconds, memory.peak


@pytest.mark.timeout(240)
def test_200_requests_in_flight(tmp_path: Path) -> None:
    *_, little = measured(tmp_path, FEWER, latency=1.0)
    figures, seconds, much = measured(tmp_path, TRACES, latency=3.5)
    assert figures["peak"] == CONCURRENCY
    share, growth = busy_share(figures["level"]), (much - little) / 2**20
    print(
        f"{figures['calls']['all']} calls in {seconds:.1f} s; {share:.1%} of the places busy; peak "
        f"memory {much / 2**20:.0f} MB, {growth:.1f} MB more than for {FEWER} traces"
    )
    assert share >= 0.9
    assert growth < 20
