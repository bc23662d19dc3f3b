"""Where the scheduler's time goes: `python -m benchmarks.profile`. Needs py-spy (extra `dev`).

Samples the scheduler processes of a stock and a memento server under the same load, and tells which
share of the samples stands in this project's own code: the innermost frame that is SGLang's or
ours is ours. What PyTorch does on our behalf counts as ours, what SGLang does below one of our
hooks does not.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load import measure
from benchmarks.scenarios import SIZES, Scenario, large_pool
from benchmarks.serve import commands
from benchmarks.shapes import write_model
from memento_sgl.demo.server import running_server

SECONDS = 20
FRAME = re.compile(r"(?P<function>[^;(]+) \((?P<path>[^;]*?)(?::\d+)?\)$")
OURS, THEIRS = ("/memento_sgl/", "/memento_patches/"), "/sglang/"


def scheduler() -> int:
    """Process id of the one scheduler below this process."""
    below = psutil.Process().children(recursive=True)
    (found,) = (p.pid for p in below if "sglang::scheduler" in " ".join(p.cmdline()))
    return found


def sample(pid: int, out: Path) -> Counter[str]:
    """Samples by innermost function that is SGLang's or ours, as `file:function`."""
    py_spy = str(Path(sys.executable).parent / "py-spy")
    command = [py_spy, "record", "--pid", str(pid), "--duration", str(SECONDS), "--rate", "200"]
    command += ["--full-filenames", "--format", "raw", "--output", str(out)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    counts: Counter[str] = Counter()
    for line in out.read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        known = [f for f in stack.split(";") if any(part in f for part in (*OURS, THEIRS))]
        counts[_label(known[-1]) if known else "other"] += int(number)
    return counts


def _label(frame: str) -> str:
    found = FRAME.match(frame)
    assert found is not None, frame
    path = Path(found["path"])
    return f"{path.parent.name}/{path.name} {found['function']}"


def run(server: str, command: list[str], scenario: Scenario, folder: Path) -> Counter[str]:
    log = folder / f"{server}.log"
    with running_server(command, log, timeout=600) as url, ThreadPoolExecutor(1) as pool:
        pid = scheduler()
        load = pool.submit(
            lambda: [
                measure(url, log, scenario.jobs, scenario.concurrency, memento=server == "memento")
                for _ in range(3)
            ]
        )
        counts = sample(pid, folder / f"{server}.txt")
        load.result()
    return counts


def main() -> None:
    console = Console(width=120)
    scenario = large_pool(SIZES["cpu"])[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "tiny", "tiny")
        lines = commands(model, scenario.pool, [], folder / "traces")
        for server in ("stock", "memento"):
            counts = run(server, lines[server], scenario, folder)
            total = sum(counts.values())
            ours = {
                f: n
                for f, n in counts.items()
                if f.startswith(("memento_sgl/", "memento_patches/"))
            }
            share = sum(ours.values()) / total
            table = Table(title=f"{server}: {total} samples, {share:.1%} in this project's code")
            table.add_column("function", overflow="fold")
            table.add_column("share", justify="right")
            for function, number in counts.most_common(8):
                table.add_row(function, f"{number / total:.1%}")
            for function, number in sorted(ours.items(), key=lambda item: -item[1])[:12]:
                table.add_row(f"ours: {function}", f"{number / total:.2%}")
            console.print(table)


if __name__ == "__main__":
    main()
