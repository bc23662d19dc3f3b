"""Small traces, and runs over them against a server in a thread or process of its own."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_server import FaultServer, Settings
from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.run.convert import Outcome, run_stages
from memento_pipeline.run.converted import converted
from memento_pipeline.run.run_options import RunOptions
from memento_pipeline.store.folder import Store
from memento_pipeline.store.schema import STAGES
from memento_pipeline.text.tokens import load_counter

SERVER = Path(__file__).with_name("fault_server.py")
FAST = AskOptions(backoff=0.01, most_backoff=0.05, timeout=4.0, concurrency=16, retries=30)

OPENINGS = ("Now I look at", "Let me take", "Next comes", "We turn to", "It remains to treat")
ENDINGS = ("That settles it.", "The first way failed.", "So far so good.", "Check: it fits.")


def thought(seed: int, paragraphs: int) -> str:
    """A deterministic chain of thought with sums, formulas and blank lines."""
    draw = random.Random(seed)
    parts = []
    for number in range(1, paragraphs + 1):
        a, b, c = (draw.randint(2, 999) for _ in range(3))
        parts.append(
            f"{draw.choice(OPENINGS)} case {number} of problem {seed}. The sum {a} + {b} equals "
            f"{a + b} by plain addition. Then \\( x_{{{number}}} = {c} \\) gives the product "
            f"{a * c} at once. Nobody would doubt the value {b} here. {draw.choice(ENDINGS)}"
        )
    return "\n\n".join(parts)


def write_traces(path: Path, count: int, paragraphs: int = 16) -> Path:
    """A JSONL file of `count` traces."""
    with path.open("w", encoding="utf-8") as file:
        for seed in range(count):
            row = {
                "id": f"t{seed:05}",
                "problem": f"Solve problem {seed}.",
                "cot": f"<think>\n{thought(seed, paragraphs)}\n</think>\nThe answer is {seed}.",
            }
            file.write(json.dumps(row) + "\n")
    return path


@contextmanager
def serving(settings: Settings | None = None, **changes: Any) -> Iterator[FaultServer]:
    """A fault server in a thread."""
    server = FaultServer(settings, **changes)
    ready, loop, end = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        async with server:
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


@contextmanager
def server_process(**settings: Any) -> Iterator[str]:
    """A fault server in a process of its own; gives its address."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), json.dumps(settings)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stats(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return dict(json.load(reply))


def options(out: Path, inputs: Path, url: str | None, **changes: Any) -> RunOptions:
    """Options of a run; without `url`, by rules."""
    endpoints = (Endpoint(url=url, model="canned"),) if url else ()
    values: dict[str, Any] = {"out": out, "inputs": (inputs,), "endpoints": endpoints, "ask": FAST}
    return RunOptions(**(values | changes))


def run(run_options: RunOptions, **how: Any) -> Outcome:
    """One run as the command line makes it, without the display."""
    settings = run_options.settings(load_counter(run_options.tokenizer).name)
    stages = how.get("stages", STAGES)
    redo, retry = how.pop("redo", ()), how.pop("retry_failed", False)
    wanted = {stage: settings[stage] for stage in stages}
    with Store(run_options.out, wanted, redo=redo) as store:
        if retry:
            store.retry_failed()
        return run_stages(run_options, store, display=False, **how)


def result_of(folder: Path) -> list[dict[str, Any]]:
    """Everything that a run made, without what it cost."""
    with Store(folder, create=False) as store:
        return [trace.model_dump(mode="json", exclude={"usage"}) for trace in converted(store)]
