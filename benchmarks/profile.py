"""Where the scheduler's time goes: `python -m benchmarks.profile`. Needs py-spy (extra `dev`).

Samples the scheduler process of a server under load: stock, memento, memento with metrics and
traces, memento with traffic that has no markers. Tells which share of the samples stands in this
project's own code: the innermost frame that is SGLang's or ours is ours. What PyTorch does on our
behalf counts as ours, what SGLang does below one of our hooks does not.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.load import measure, scheduler_process
from benchmarks.scenarios import SIZES, Scenario, large_pool
from benchmarks.serve import commands
from benchmarks.shapes import write_model
from memento_sgl.demo.server import running_server

SECONDS = 20
# py-spy takes these threads, which wait nearly always, for active now and then.
WAITING = ("TraceWriter._run", "WatchdogRaw._watchdog_once")
RUNS = (
    ("unpressured", "stock"),
    ("unpressured", "memento"),
    ("unpressured", "observed"),
    ("no markers", "memento"),
)
FRAME = re.compile(r"(?P<function>[^;(]+) \((?P<path>[^;]*?)(?::\d+)?\)$")
OURS, THEIRS = ("/memento_sgl/", "/memento_patches/"), "/sglang/"
# Shares with everything that is called from there; `Watch.feed` also does what is done without it.
OBSERVING = {
    "metrics and traces, with what they call": re.compile(r"/memento_sgl/observe/"),
    "SGLang's metrics, with what they call": re.compile(r"/observability/metrics_\w+\.py"),
}


def sample(pid: int, out: Path) -> tuple[Counter[str], Counter[str]]:
    """Samples by innermost function that is SGLang's or ours, and those of `OBSERVING`."""
    py_spy = str(Path(sys.executable).parent / "py-spy")
    command = [py_spy, "record", "--pid", str(pid), "--duration", str(SECONDS), "--rate", "200"]
    command += ["--full-filenames", "--format", "raw", "--output", str(out)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    counts: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    for line in out.read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        known = [f for f in stack.split(";") if any(part in f for part in (*OURS, THEIRS))]
        label = _label(known[-1]) if known else "other"
        if label.endswith(WAITING):
            continue
        counts[label] += int(number)
        for name, files in OBSERVING.items():
            if files.search(stack):
                inclusive[name] += int(number)
    return counts, inclusive


def _label(frame: str) -> str:
    found = FRAME.match(frame)
    assert found is not None, frame
    path = Path(found["path"])
    return f"{path.parent.name}/{path.name} {found['function']}"


def run(
    server: str, command: list[str], scenario: Scenario, folder: Path
) -> tuple[Counter[str], Counter[str]]:
    log = folder / f"{server}.log"
    with running_server(command, log, timeout=600) as url, ThreadPoolExecutor(1) as pool:
        pid = scheduler_process().pid
        load = pool.submit(
            lambda: [
                measure(url, log, scenario.jobs, scenario.concurrency, memento=server != "stock")
                for _ in range(3)
            ]
        )
        found = sample(pid, folder / f"{server}.txt")
        load.result()
    return found


def show(console: Console, title: str, counts: Counter[str], inclusive: Counter[str]) -> None:
    total = sum(counts.values())
    wrappers = sum(n for f, n in counts.items() if f.startswith("plugins/hook_registry.py"))
    files: Counter[str] = Counter()
    for function, number in counts.items():
        if function.startswith(("memento_sgl/", "memento_patches/")):
            files[function.partition(" ")[0]] += number
    ours = sum(files.values()) / total
    title = f"{title}: {total} samples, {ours:.1%} in this project's code"
    table = Table(title=f"{title}, {wrappers / total:.1%} in hook wrappers", title_justify="left")
    table.add_column("where", overflow="fold")
    table.add_column("share", justify="right")
    for function, number in counts.most_common(6):
        table.add_row(function, f"{number / total:.1%}")
    for file, number in files.most_common(12):
        table.add_row(f"ours: {file}", f"{number / total:.2%}")
    for name, number in inclusive.items():
        table.add_row(name, f"{number / total:.2%}")
    console.print(table)


def main() -> None:
    console = Console(width=120)
    scenarios = {scenario.name: scenario for scenario in large_pool(SIZES["cpu"])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "tiny", "tiny")
        for which, server in RUNS:
            scenario = scenarios[which]
            command = commands(model, scenario.pool, [], folder / "traces")[server]
            show(console, f"{which}, {server}", *run(server, command, scenario, folder))


if __name__ == "__main__":
    main()
