"""What memento costs where it has nothing to win: `python -m benchmarks.overhead`.

A few percent are less than two servers of the same kind differ by, so one pair of them shows
nothing. Each start of the servers gives one ratio: the mean over many short rounds, in which the
servers take turns in random order. The table shows the mean over starts with its 95 % confidence
interval (Student's t), by the clock (tokens per second) and by the CPU time of the scheduler
process (tokens per CPU second). `again` is the first thing once more: pure noise. Metrics and
traces are switched on and off within one server, so that nothing else differs.

    python -m benchmarks.overhead --only observed --starts 3
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

from benchmarks.load import Outcome, measure, scheduler_process
from benchmarks.observe import SETTLE, sample
from benchmarks.observing import OFF, ON
from benchmarks.serve import commands
from benchmarks.shapes import SHAPES, write_model
from benchmarks.traffic import Job, plain, reasoning
from memento_sgl.demo.server import running_server
from memento_sgl.observe.metrics import PREFIX

CONCURRENCY = 8
POOL = 40_000
console = Console(width=120)


class Entrant(NamedTuple):
    """What takes its turn: a server by its kind, those of the same kind told apart by `number`.

    `observed` switches metrics and traces of an `observing` server before each round.
    """

    kind: str
    number: int = 0
    observed: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """Entrants by their names in the table; the first is what the others are compared with.

    `rounds` are short: the speed of a shared machine changes within seconds.
    """

    name: str
    what: str
    jobs: list[Job]
    entrants: dict[str, Entrant]
    rounds: int


COMPARISONS = (
    Comparison(
        "no markers",
        "plain text",
        plain(8, 120, seed=4),
        {"stock": Entrant("stock"), "again": Entrant("stock", 1), "memento": Entrant("memento")},
        rounds=40,
    ),
    Comparison(
        "observed",
        "metrics and traces of blocks and evictions, against SGLang's metrics only",
        reasoning(8, 0.1, seed=3),
        {
            "not observed": Entrant("observing", observed=False),
            "again": Entrant("observing", observed=False),
            "observed": Entrant("observing", observed=True),
        },
        rounds=7,
    ),
)


class Speeds(dict[str, list[tuple[float, float]]]):
    """Tokens per second and per CPU second of the scheduler, of each round, by entrant."""

    def ratios(self, which: int) -> dict[str, float]:
        """Mean over rounds of the ratio to the first entrant; 0: by the clock, 1: by CPU time."""
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


class Running(NamedTuple):
    """A server, its log and its scheduler process."""

    url: str
    log: Path
    scheduler: psutil.Process


def one_start(
    comparison: Comparison,
    model: Path,
    flags: list[str],
    rounds: int,
    seed: int,
    step: Callable[[], None],
) -> Speeds:
    """Start the servers and let the entrants take turns; calls `step` after each round.

    Raises:
        RuntimeError: a request failed, or a server was observed when it should not be.
    """
    speeds = Speeds({name: [] for name in comparison.entrants})
    order = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        running: dict[tuple[str, int], Running] = {}
        launch = commands(model, POOL, flags, folder / "traces")
        needed = sorted(
            {(entrant.kind, entrant.number) for entrant in comparison.entrants.values()}
        )
        for server in order.sample(needed, len(needed)):
            log = folder / f"{len(running)}.log"
            url = stack.enter_context(running_server(launch[server[0]], log, timeout=600))
            known = {one.scheduler.pid for one in running.values()}
            running[server] = Running(url, log, scheduler_process(known))
        for number in range(rounds + 1):
            for name in order.sample(list(comparison.entrants), len(comparison.entrants)):
                entrant = comparison.entrants[name]
                found = _turn(entrant, running[entrant.kind, entrant.number], comparison.jobs)
                if found.failures:
                    raise RuntimeError(f"{name}: {found.failures[0]}")
                if number:  # the first round warms up
                    speeds[name].append((found.speed, found.tokens / found.cpu_seconds))
                step()
    return speeds


def _turn(entrant: Entrant, server: Running, jobs: list[Job]) -> Outcome:
    if entrant.observed is not None:
        server.scheduler.send_signal(ON if entrant.observed else OFF)
        before = _traces(server.url)
    found = measure(
        server.url,
        server.log,
        jobs,
        CONCURRENCY,
        memento=entrant.kind != "stock",
        flush=False,
        scheduler=server.scheduler,
    )
    if entrant.observed is not None:
        time.sleep(SETTLE)
        traced, expected = _traces(server.url) - before, len(jobs) if entrant.observed else 0
        if traced != expected:
            raise RuntimeError(f"{traced} trace files of a round, and not {expected}")
    return found


def _traces(url: str) -> int:
    """Trace files that a server has written."""
    return int(sample(url, f"{PREFIX}traces_total", "outcome").get("written", 0))


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
    first, *others = comparison.entrants
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
            steps = starts * (turns + 1) * len(comparison.entrants)
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
