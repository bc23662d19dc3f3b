"""What metrics and traces cost in a running server: `python -m benchmarks.observe`.

Time of the scheduler process within their functions, the writing thread and its files included, as
a share of all its CPU time in the same rounds: a busy machine slows both alike. Requests have the
lengths of the paper, times a scale. `benchmarks.overhead` compares speeds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import psutil
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.load import measure, scheduler_process
from benchmarks.observing import COUNTER, ON
from benchmarks.serve import commands
from benchmarks.shapes import write_model
from benchmarks.traffic import reasoning
from memento_sgl.demo.server import running_server

CONCURRENCY = 8
POOL = 80_000
ROUNDS = {0.05: 10, 0.1: 5, 1.0: 1}
"""Rounds of eight requests by scale of their lengths."""
SETTLE = 0.5
"""Seconds in which a server writes its last traces and answers a signal."""


def sample(url: str, name: str, label: str) -> dict[str, float]:
    """A metric of a server by one of its labels, summed over all others."""
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == name:
                value = one.labels[label]
                found[value] = found.get(value, 0.0) + one.value
    return found


def spent(url: str, scheduler: psutil.Process) -> dict[str, float]:
    """Seconds of metrics and traces so far, by thread."""
    time.sleep(SETTLE)
    scheduler.send_signal(ON)
    time.sleep(SETTLE)
    return sample(url, f"{COUNTER}_total", "thread")


def row(url: str, log: Path, scale: float, step: Callable[[], None]) -> list[str]:
    """The table's row for one scale; calls `step` after each round.

    Raises:
        RuntimeError: a request failed.
    """
    scheduler, jobs = scheduler_process(), reasoning(8, scale, seed=3)
    before, tokens, total = spent(url, scheduler), 0, 0.0
    for _ in range(ROUNDS[scale]):
        found = measure(url, log, jobs, CONCURRENCY, memento=True, flush=False, scheduler=scheduler)
        if found.failures:
            raise RuntimeError(found.failures[0])
        tokens += found.tokens
        total += found.cpu_seconds
        step()
    after = spent(url, scheduler)
    took = {thread: after[thread] - before.get(thread, 0.0) for thread in ("scheduler", "writer")}
    own = sum(took.values())
    blocks = ROUNDS[scale] * sum(job.options["max_blocks"] for job in jobs)
    times = (1e6 * own / blocks, 1e6 * own / tokens, 1e6 * total / tokens)
    shares = (f"{seconds / total:.2%}" for seconds in (own, *took.values()))
    return [f"paper's x {scale}", str(tokens), str(blocks), *(f"{us:.2f}" for us in times), *shares]


def main() -> None:
    """Measure the share of metrics and traces in the scheduler's time."""
    table = Table(title="metrics and traces", title_justify="left")
    columns = ("lengths", "tokens", "blocks", "us per block", "us per token", "of", "share")
    for column in (*columns, "scheduler thread", "writer"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bar:
        folder = Path(name)
        log = folder / "server.log"
        model = write_model(folder / "tiny", "tiny")
        command = commands(model, POOL, [], folder / "traces")["observing"]
        task = bar.add_task("observing", total=sum(ROUNDS.values()))
        with running_server(command, log, timeout=600) as url:
            for scale in ROUNDS:
                table.add_row(*row(url, log, scale, partial(bar.advance, task)))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
