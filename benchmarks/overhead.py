"""What memento costs where it has nothing to win: `python -m benchmarks.overhead`.

A few percent are less than two servers of the same kind differ by, so one pair of them shows
nothing. Each start of the servers gives one ratio: the mean over many short rounds, in which the
servers take turns in random order. The table shows the mean over starts with its 95 % confidence
interval (Student's t), by the clock (tokens per second) and by the CPU time of the scheduler
process (tokens per CPU second). `again` is a second server of the first kind: pure noise.

    python -m benchmarks.overhead --only observed --starts 3
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

from benchmarks.load import measure, scheduler_process
from benchmarks.serve import commands
from benchmarks.shapes import SHAPES, write_model
from benchmarks.traffic import Job, plain, reasoning
from memento_sgl.demo.server import running_server

CONCURRENCY = 8
POOL = 40_000
console = Console(width=120)


@dataclass(frozen=True)
class Comparison:
    """Servers by their names in the table; the first is what the others are compared with.

    `rounds` are short: the speed of a shared machine changes within seconds.
    """

    name: str
    what: str
    jobs: list[Job]
    servers: dict[str, str]
    rounds: int


COMPARISONS = (
    Comparison(
        "no markers",
        "plain text",
        plain(8, 120, seed=4),
        {"stock": "stock", "again": "stock", "memento": "memento"},
        rounds=40,
    ),
    Comparison(
        "observed",
        "metrics and traces of blocks and evictions; all but `memento` with --enable-metrics",
        reasoning(8, 0.05, seed=3),
        {
            "SGLang's metrics only": "sglang-metrics",
            "all metrics and traces": "observed",
            "memento": "memento",
        },
        rounds=15,
    ),
)


class Speeds(dict[str, list[tuple[float, float]]]):
    """Tokens per second and per CPU second of the scheduler, of each round, by server."""

    def ratios(self, which: int) -> dict[str, float]:
        """Mean over rounds of the ratio to the first server; 0: by the clock, 1: by CPU time."""
        first, *others = self
        return {
            name: math.exp(
                statistics.fmean(
                    math.log(mine[which] / base[which])
                    for mine, base in zip(self[name], self[first], strict=True)
                )
            )
            for name in others
        }


def one_start(
    comparison: Comparison,
    model: Path,
    flags: list[str],
    rounds: int,
    seed: int,
    step: Callable[[], None],
) -> Speeds:
    """Start the servers and let them take turns; calls `step` after each start and round.

    Raises:
        RuntimeError: a request failed.
    """
    speeds = Speeds({name: [] for name in comparison.servers})
    order = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        running: dict[str, tuple[str, Path, psutil.Process]] = {}
        launch = commands(model, POOL, flags, folder / "traces")
        for server in order.sample(list(comparison.servers), len(comparison.servers)):
            log = folder / f"{len(running)}.log"
            kind = comparison.servers[server]
            url = stack.enter_context(running_server(launch[kind], log, timeout=600))
            known = {process.pid for _, _, process in running.values()}
            running[server] = url, log, scheduler_process(known)
            step()
        for number in range(rounds + 1):
            for server in order.sample(list(running), len(running)):
                url, log, process = running[server]
                memento = comparison.servers[server] != "stock"
                found = measure(
                    url,
                    log,
                    comparison.jobs,
                    CONCURRENCY,
                    memento=memento,
                    flush=False,
                    scheduler=process,
                )
                if found.failures:
                    raise RuntimeError(f"{server}: {found.failures[0]}")
                if number:  # the first round warms up
                    speeds[server].append((found.speed, found.tokens / found.cpu_seconds))
                step()
    return speeds


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % confidence interval; NaN bounds for a single value."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    half = math.nan
    if len(logs) > 1:
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        half = float(stats.t.ppf(0.975, len(logs) - 1)) * error
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def show(comparison: Comparison, starts: list[Speeds]) -> None:
    title = f"{comparison.name}: {comparison.what}; {len(starts)} starts"
    table = Table(title=title, title_justify="left")
    for column in ("against the first", "tokens/s", "95 %", "tokens per CPU s", "95 %"):
        table.add_column(column, justify="right")
    first, *others = comparison.servers
    table.add_row(first, "1", "", "1", "")
    for name in others:
        cells = []
        for which in (0, 1):
            middle, low, high = interval([speeds.ratios(which)[name] for speeds in starts])
            cells += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(name, *cells)
    console.print(table)


def main(
    flags: Annotated[list[str] | None, typer.Argument(help="SGLang flags, behind --")] = None,
    model: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "tiny",
    only: Annotated[str, typer.Option(help=" or ".join(c.name for c in COMPARISONS))] = "",
    starts: Annotated[int, typer.Option(min=1, help="Times the servers are started.")] = 8,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of each one's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for overhead.json.")] = Path("bench-output"),
) -> None:
    """Measure the cost of memento without markers, and of metrics and traces, with intervals."""
    chosen = [c for c in COMPARISONS if only in ("", c.name)]
    if not chosen:
        known = ", ".join(c.name for c in COMPARISONS)
        raise typer.BadParameter(f"no comparison {only!r}; there are: {known}")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Speeds]] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bar:
        path = write_model(Path(folder) / model, model)
        for comparison in chosen:
            turns = rounds or comparison.rounds
            steps = starts * (turns + 2) * len(comparison.servers)
            task = bar.add_task(comparison.name, total=steps)
            results[comparison.name] = []
            for number in range(starts):
                step = partial(bar.advance, task)
                found = one_start(comparison, path, flags or [], turns, number, step)
                results[comparison.name].append(found)
                (out / "overhead.json").write_text(json.dumps(results, indent=1))
            show(comparison, results[comparison.name])
    console.print(f"written: {out / 'overhead.json'}")


if __name__ == "__main__":
    typer.run(main)
