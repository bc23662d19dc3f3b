"""A closed-loop client: sends requests to one server and measures what came back."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.traffic import Job

STREAMED = 4  # every so manieth request is streamed, for inter-token latencies
DECODE = re.compile(r"Decode batch.*?#running-req: (\d+), #token: (\d+)")


@dataclass
class Outcome:
    """One round on one server. Units: seconds, tokens; latencies between streamed tokens.

    `cpu_seconds` is what the scheduler process used, where it was given.
    `running` and `held` are the requests and KV tokens of every logged decode batch.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    retractions: int = 0
    failures: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def take(self, answer: dict[str, Any]) -> None:
        meta = answer["meta_info"]
        self.tokens += meta["completion_tokens"]
        self.retractions += meta.get("num_retractions") or 0
        if (record := meta.get("memento")) is not None:
            self.records.append(record)
        reason = meta["finish_reason"] or {}
        if reason.get("type") == "abort":
            self.failures.append(reason.get("message", "aborted"))


def measure(
    url: str,
    log: Path,
    jobs: list[Job],
    concurrency: int,
    *,
    memento: bool,
    flush: bool = True,
    scheduler: psutil.Process | None = None,
) -> Outcome:
    """Run all jobs, at most `concurrency` requests at a time.

    Args:
        log: the server's log: what it says about its decode batches gives running requests and
            KV tokens in use.
        memento: send each job's memento options.
        flush: empty the cache before.
        scheduler: whose CPU time is wanted.

    Raises:
        RuntimeError: no request came through, or the log says nothing about it.
    """
    if flush:
        httpx.post(f"{url}/flush_cache", timeout=60).raise_for_status()
    start, used = log.stat().st_size, _cpu_seconds(scheduler)
    outcome = asyncio.run(_run(url, jobs, concurrency, memento))
    outcome.cpu_seconds = _cpu_seconds(scheduler) - used
    with log.open("rb") as lines:
        lines.seek(start)
        for running, held in DECODE.findall(lines.read().decode(errors="replace")):
            outcome.running.append(int(running))
            outcome.held.append(int(held))
    if not (outcome.tokens and outcome.running):
        raise RuntimeError(f"nothing to measure at {url}; failed requests: {outcome.failures[:2]}")
    return outcome


def scheduler_process(known: Collection[int] = ()) -> psutil.Process:
    """The one scheduler process below this one whose id is not `known`."""
    below = psutil.Process().children(recursive=True)
    (found,) = (
        p for p in below if p.pid not in known and "sglang::scheduler" in " ".join(p.cmdline())
    )
    return found


def _cpu_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


async def _run(url: str, jobs: list[Job], concurrency: int, memento: bool) -> Outcome:
    outcome = Outcome()
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:

        async def one(number: int, job: Job) -> None:
            body = _body(job, memento)
            async with gate:
                if number % STREAMED == 0 and job.samples == 1:
                    await _stream(client, body, outcome)
                else:
                    await _whole(client, body, outcome)

        started = time.perf_counter()
        await asyncio.gather(*(one(number, job) for number, job in enumerate(jobs)))
        outcome.seconds = time.perf_counter() - started
    return outcome


def _body(job: Job, memento: bool) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "max_new_tokens": job.tokens,
        "temperature": 1.0,
        "ignore_eos": True,
        "n": job.samples,
    }
    if job.banned:
        sampling["logit_bias"] = {str(token): -100.0 for token in job.banned}
    if memento:
        sampling["custom_params"] = {"memento": job.options}
    return {"input_ids": job.ids, "sampling_params": sampling}


async def _whole(client: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome) -> None:
    response = await client.post("/generate", json=body)
    if response.status_code != 200:
        outcome.failures.append(response.text)
        return
    answers = response.json()
    for answer in answers if isinstance(answers, list) else [answers]:
        outcome.take(answer)


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome) -> None:
    """As `_whole`; also the time between consecutive chunks, per token in the later one."""
    before, known, last = 0.0, 0, None
    async with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            outcome.failures.append((await response.aread()).decode())
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, last = time.perf_counter(), json.loads(line[6:])
            if "meta_info" not in last:
                outcome.failures.append(line)
                return
            count = last["meta_info"]["completion_tokens"]
            if known and count > known:
                outcome.latencies += [(now - before) / (count - known)] * (count - known)
            if count > known:
                before, known = now, count
    if last is not None:
        outcome.take(last)
