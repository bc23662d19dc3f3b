"""What the page at /memento costs a server: `python -m benchmarks.page`.

Ten chats at once, in four ways that take turns within each round: by a client that streams over
HTTP, by the same client while the page is open and shows the server's load, by a client over the
page's WebSocket, and by the page itself, which draws all ten. The last one's browser takes its
share of the same machine, so the CPU time that the server's processes spend per token stands beside
the clock.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import psutil
import typer
import websockets
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.load import scheduler_process
from memento_sgl.demo.server import running_server, serve_command
from memento_sgl.demo.task import held_out

CHATS = 10
BLOCKS = 12
WAYS = ("HTTP", "HTTP, page open", "WebSocket", "page")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Round(NamedTuple):
    """One way, once: tokens per second; CPU microseconds per token of two processes."""

    speed: float
    scheduler: float
    http: float


def question(number: int) -> str:
    return held_out(CHATS, sizes=[BLOCKS])[number].question


def body(number: int) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": question(number)}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "custom_params": {"memento": {"show_markers": True}},
    }


def counted(event: str, before: int) -> int:
    """The output tokens that a streamed event tells; `before` where it tells none."""
    usage = json.loads(event).get("usage") or {}
    return int(usage.get("completion_tokens", before))


async def stream(url: str) -> int:
    """Ten chats over HTTP; returns their tokens."""

    async def one(client: httpx.AsyncClient, number: int) -> int:
        tokens = 0
        async with client.stream("POST", "/v1/chat/completions", json=body(number)) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    tokens = counted(line[6:], tokens)
        return tokens

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return sum(await asyncio.gather(*(one(client, number) for number in range(CHATS))))


async def relay(url: str) -> int:
    """The same chats over the page's WebSocket; returns their tokens."""
    tokens = dict.fromkeys(range(CHATS), 0)
    running = CHATS
    async with websockets.connect(f"{url.replace('http', 'ws')}/memento/socket") as socket:
        for number in tokens:
            await socket.send(json.dumps({"id": number, "ask": body(number)}))
        while running:
            for line in str(await socket.recv()).split("\n"):
                number, payload = int(line.split(" ", 1)[0]), line.split(" ", 1)[1]
                if payload == ".":
                    running -= 1
                else:
                    tokens[number] = counted(payload, tokens[number])
    return sum(tokens.values())


def in_page(tab: Any) -> int:
    """The same chats by the page, whose ten columns are open; returns their tokens."""
    tab.evaluate(
        """questions => questions.forEach((question, number) => {
          const chat = app.chats[number];
          chat.turns = [];
          chat.log.replaceChildren();
          chat.ask(question);
        })""",
        [question(number) for number in range(CHATS)],
    )
    tab.wait_for_function("() => app.chats.every(chat => !chat.running)", timeout=600_000)
    tokens: int = tab.evaluate(
        "() => app.chats.reduce((sum, chat) => sum + chat.turns[0].story.counted, 0)"
    )
    return tokens


def measure(act: Callable[[], int], scheduler: psutil.Process, server: psutil.Process) -> Round:
    used = [_cpu(process) for process in (scheduler, server)]
    started = time.perf_counter()
    tokens = act()
    seconds = time.perf_counter() - started
    spent = [
        _cpu(process) - before for process, before in zip((scheduler, server), used, strict=True)
    ]
    return Round(tokens / seconds, *(1e6 * one / tokens for one in spent))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run(rounds: int, url: str, progress: Callable[[], None]) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    scheduler = scheduler_process()
    server = scheduler.parent()
    assert server is not None
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        tab = browser.new_page(viewport={"width": 1600, "height": 900})
        # Playwright has a running event loop in this thread.
        client = ThreadPoolExecutor(1)
        acts: dict[str, Callable[[], int]] = {
            "HTTP": lambda: client.submit(asyncio.run, stream(url)).result(),
            "HTTP, page open": lambda: client.submit(asyncio.run, stream(url)).result(),
            "WebSocket": lambda: client.submit(asyncio.run, relay(url)).result(),
            "page": lambda: in_page(tab),
        }
        for number in range(rounds + 1):  # the first one warms up
            for way in WAYS[:: 1 if number % 2 else -1]:
                tab.goto("about:blank")
                if "page" in way:
                    tab.goto(f"{url}/memento")
                    tab.wait_for_selector(".chat textarea")
                if way == "page":
                    tab.evaluate("() => { for (let n = 1; n < 10; n += 1) app.add(); }")
                result = measure(acts[way], scheduler, server)
                if number:
                    found[way].append(result)
                progress()
        browser.close()
    return found


def main(rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 7) -> None:
    """Measure ten chats with and without the page."""
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("page", total=len(WAYS) * (rounds + 1))
        flags = ("--max-total-tokens", "20000", "--log-level", "warning")
        command = serve_command("demo", *flags)
        with running_server(command, Path(name) / "log", timeout=600) as url:
            found = run(rounds, url, lambda: bar.advance(task))
    table = Table(title=f"{CHATS} chats, median of {rounds} rounds", title_justify="left")
    for column in (
        "",
        "tokens/s",
        "ratio",
        "scheduler us/token",
        "ratio",
        "HTTP us/token",
        "ratio",
    ):
        table.add_column(column, justify="right" if column else "left")
    base = found["HTTP"]
    for way, results in found.items():
        cells = []
        for values, first in zip(zip(*results, strict=True), zip(*base, strict=True), strict=True):
            ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
            cells += [f"{statistics.median(values):.0f}", f"{ratio:.3f}"]
        table.add_row(way, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
