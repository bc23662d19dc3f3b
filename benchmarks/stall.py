"""What prompts with finished blocks cost others: `python -m benchmarks.stall [--against CHECKOUT]`.

Three figures, on servers that run at once and take turns (stock, memento, memento of another
checkout): the worst gap between two tokens of a stream while a prompt of 300 blocks of 7 tokens, or
a plain prompt of two chunks, is prefilled; prefill tokens/s of cold prompts of 9 finished blocks of
the paper's lengths, 8 at a time; time from a retraction of all 64 requests, with 9 finished blocks
each, to their next tokens. Speeds come with the geometric mean of their ratios, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.overhead import interval
from benchmarks.serve import commands
from benchmarks.shapes import write_model
from benchmarks.traffic import BLOCK_TOKENS, LETTERS, MARKERS, MEMENTO_TOKENS
from memento_sgl.demo.server import running_server

CHUNK = 2048
ROUNDS = 5
OPEN, CLOSE, SUMMARY, END = MARKERS[:4]


def blocks(rng: random.Random, count: int, block: int, memento: int) -> list[int]:
    """A prompt of finished blocks."""
    ids = rng.choices(LETTERS, k=4)
    for _ in range(count):
        ids += [OPEN, *rng.choices(LETTERS, k=block), CLOSE]
        ids += [SUMMARY, *rng.choices(LETTERS, k=memento), END]
    return [*ids, *rng.choices(LETTERS, k=2)]


def body(ids: list[int], tokens: int, memento: bool, **more: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    sampling["logit_bias"] = {str(marker): -100.0 for marker in MARKERS}
    if memento:
        sampling["custom_params"] = {"memento": {"assistant_start": 0}}
    return {"input_ids": ids, "sampling_params": sampling, **more}


async def stream_times(
    client: httpx.AsyncClient, request: dict[str, Any], times: list[float]
) -> list[float]:
    """When each piece of an answer arrived; `times` grows meanwhile."""
    async with client.stream("POST", "/generate", json=request | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:]), line
                times.append(time.perf_counter())
    return times


async def post(client: httpx.AsyncClient, path: str, request: dict[str, Any]) -> Any:
    response = await client.post(path, json=request)
    response.raise_for_status()
    return response


async def gap(client: httpx.AsyncClient, memento: bool, ids: list[int]) -> float:
    """Worst gap of another stream while `ids` is prefilled, in seconds."""
    rng = random.Random(str(ids[:4]))
    other = asyncio.create_task(
        stream_times(
            client, body(rng.choices(LETTERS, k=30), 1500, False, rid=str(rng.random())), []
        )
    )
    await asyncio.sleep(1.0)
    began = time.perf_counter()
    await post(client, "/generate", body(ids, 1, memento))
    ended = time.perf_counter()
    await post(client, "/abort_request", {"rid": "", "abort_all": True})
    times = await other
    pairs = [(a, b) for a, b in itertools.pairwise(times) if b > began and a < ended]
    return max(b - a for a, b in pairs)


async def prefill_speed(
    client: httpx.AsyncClient, memento: bool, prompts: list[list[int]]
) -> float:
    """Prefill tokens/s of cold prompts, 8 at a time."""
    places = asyncio.Semaphore(8)

    async def ask(ids: list[int]) -> None:
        async with places:
            await post(client, "/generate", body(ids, 1, memento))

    began = time.perf_counter()
    await asyncio.gather(*map(ask, prompts))
    return sum(map(len, prompts)) / (time.perf_counter() - began)


async def resumption(
    client: httpx.AsyncClient, memento: bool, prompts: list[list[int]]
) -> tuple[float, float]:
    """Median and 95th percentile of a request's pause around a retraction of all."""
    arrived: list[list[float]] = [[] for _ in prompts]
    streams = [
        asyncio.create_task(stream_times(client, body(ids, 400, memento), times))
        for ids, times in zip(prompts, arrived, strict=True)
    ]
    while not all(arrived):
        await asyncio.sleep(0.1)
        assert not any(stream.done() for stream in streams), "an answer ended before all began"
    retracted = time.perf_counter()
    await post(client, "/pause_generation", {"mode": "retract"})
    await post(client, "/continue_generation", {})
    found = []
    for times in await asyncio.gather(*streams):
        # Tokens from before the retraction may still arrive behind it: the pause is what counts.
        found.append(max(b - a for a, b in itertools.pairwise(times) if b > retracted))
    return statistics.median(found), statistics.quantiles(found, n=20)[-1]


def paper(seed: int, count: int, scale: float) -> list[list[int]]:
    rng = random.Random(seed)
    sizes = round(BLOCK_TOKENS * scale), round(MEMENTO_TOKENS * scale)
    return [blocks(rng, 9, *sizes) for _ in range(count)]


Measure = Callable[[httpx.AsyncClient, bool, int], Coroutine[Any, Any, Any]]
FIGURES: dict[str, Measure] = {
    "worst gap, 300 blocks [s]": lambda client, memento, seed: gap(
        client, memento, blocks(random.Random(seed), 300, 7, 0)
    ),
    "worst gap, two plain chunks [s]": lambda client, memento, seed: gap(
        client, memento, random.Random(seed).choices(LETTERS, k=2 * CHUNK)
    ),
    "prefill tokens/s, lengths x 0.1": lambda client, memento, seed: prefill_speed(
        client, memento, paper(seed, 48, 0.1)
    ),
    "prefill tokens/s, lengths x 1.0": lambda client, memento, seed: prefill_speed(
        client, memento, paper(seed, 8, 1.0)
    ),
    "retracted, next token [s]": lambda client, memento, seed: resumption(
        client, memento, paper(seed, 64, 0.1)
    ),
}


async def turn(url: str, memento: bool, measure: Measure, seed: int) -> Any:
    # A busy server closes an idle connection just when it is used again: no connection is kept.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        await post(client, "/flush_cache", {})
        return await measure(client, memento, seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout whose memento runs too")
    parser.add_argument("--only", default="", help="figures whose names hold this")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--page-size", type=int, default=1)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        flags = ["--chunked-prefill-size", str(CHUNK), "--page-size", str(chosen.page_size)]
        known = commands(write_model(folder / "tiny", "tiny"), 120_000, flags, folder)
        servers = {"stock": (known["stock"], {}), "memento": (known["memento"], {})}
        if chosen.against is not None:
            parts = ("", "frontend", "pipeline", "patches")
            path = ":".join(str(chosen.against.resolve() / part) for part in parts)
            servers["memento before"] = (known["memento"], {"PYTHONPATH": path})
        urls = {
            server: stack.enter_context(
                running_server(
                    command, folder / f"{server}.log", environment=environment, timeout=600
                )
            )
            for server, (command, environment) in servers.items()
        }
        for label, measure in FIGURES.items():
            if chosen.only not in label:
                continue
            found: dict[str, list[Any]] = {server: [] for server in urls}
            for number in range(chosen.rounds):
                for server, url in list(urls.items())[:: 1 if number % 2 else -1]:
                    memento = server != "stock"
                    found[server].append(asyncio.run(turn(url, memento, measure, number)))
            for server, figures in found.items():
                columns = zip(*(f if isinstance(f, tuple) else (f,) for f in figures), strict=True)
                medians = ", ".join(f"{statistics.median(column):.3f}" for column in columns)
                print(f"{label}: {server} {medians}  {figures}", flush=True)
                if "tokens/s" in label and server != "stock":
                    ratios = [a / b for a, b in zip(figures, found["stock"], strict=True)]
                    middle, low, high = interval(ratios)
                    print(f"    of stock's: {middle:.3f}, 95 % {low:.3f} to {high:.3f}", flush=True)


if __name__ == "__main__":
    main()
