"""What is compared: traffic, the variants that serve it, and the pool that each server gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.traffic import Job, plain, reasoning


class Variant(NamedTuple):
    """How a round is served: which server, and which memento options the jobs carry there.

    `keep` false drops the traffic's own options, `extra` adds to them.
    """

    name: str
    server: str
    keep: bool = True
    extra: dict[str, Any] | None = None

    def jobs(self, jobs: list[Job]) -> list[Job]:
        if self.server == "stock":
            return jobs
        extra = self.extra or {}
        return [j._replace(options=(j.options if self.keep else {}) | extra) for j in jobs]


NEVER = {"keep_last_n_blocks": -1}
STOCK = Variant("stock", "stock")
MEMENTO = Variant("memento", "memento")
KEEPING = Variant("memento, no eviction", "memento", extra=NEVER)
FREE = Variant("memento, free, no eviction", "memento", keep=False, extra=NEVER)
OBSERVED = Variant("memento, metrics and traces", "observed")


@dataclass(frozen=True)
class Scenario:
    """One comparison; ratios are taken against the first variant. `pool` is in KV tokens."""

    name: str
    what: str
    jobs: list[Job]
    pool: int
    concurrency: int
    variants: tuple[Variant, ...] = (STOCK, MEMENTO)
    rounds: int = 3


@dataclass(frozen=True)
class Size:
    """How much of everything; `scale` multiplies the lengths of the paper."""

    scale: float
    requests: int
    prompts: int
    plain_tokens: int
    concurrencies: tuple[int, ...]


SIZES = {
    "cpu": Size(0.1, 48, 6, 300, (1, 4, 16, 64)),
    "gpu": Size(1.0, 240, 30, 2000, (1, 4, 16, 64, 256)),
}


def logical(jobs: list[Job]) -> int:
    """KV tokens that all jobs would hold together without sharing or eviction."""
    return sum(job.logical for job in jobs)


def small_pool(size: Size) -> list[Scenario]:
    """Traffic that needs far more than the pool; all of it on one pair of servers."""
    jobs = reasoning(size.requests, size.scale, seed=1)
    pool = logical(jobs) // 5
    several = reasoning(size.prompts, size.scale, seed=2, samples=8, prompt=800)
    long = with_blocks(reasoning(1, size.scale, seed=5), tokens=3 * pool)
    return [
        Scenario("pressured", "pool a fifth of what all requests need", jobs, pool, len(jobs)),
        Scenario("many samples", "8 samples of each prompt", several, pool, len(several)),
        Scenario("long", "one request three times as long as the pool", long, pool, 1, rounds=1),
    ]


def large_pool(size: Size) -> list[Scenario]:
    """Traffic that never fills the pool: what memento costs, and what shorter attention gains."""
    jobs = reasoning(size.requests // 3, size.scale, seed=3)
    words = plain(size.requests, size.plain_tokens, seed=4)
    crowds = [reasoning(count, size.scale / 4, seed=6) for count in size.concurrencies]
    lengths = [
        with_blocks(reasoning(8, size.scale / 2, seed=7), tokens=round(size.scale * tokens))
        for tokens in (4_000, 12_000, 36_000)
    ]
    pool = 2 * max(map(logical, (jobs, words, *crowds, *lengths)))
    three = (STOCK, MEMENTO, KEEPING)
    return [
        Scenario("unpressured", "pool larger than needed", jobs, pool, 8, three),
        Scenario("no markers", "plain text, memento enabled", words, pool, 8),
        Scenario("strict emission", "what it costs", jobs, pool, 8, (FREE, KEEPING)),
        Scenario("observed", "what it costs", jobs, pool, 8, (MEMENTO, OBSERVED)),
        *(
            Scenario(f"{len(crowd)} at a time", "short requests", crowd, pool, len(crowd), rounds=1)
            for crowd in crowds
        ),
        *(
            Scenario(f"{some[0].tokens} tokens", "8 at a time", some, pool, 8, rounds=1)
            for some in lengths
        ),
    ]


def with_blocks(jobs: list[Job], tokens: int) -> list[Job]:
    """The same jobs, as many tokens long, in as many blocks of their own size as fit."""
    found = []
    for job in jobs:
        size = job.options["max_block_tokens"] + job.options["max_summary_tokens"] + 4
        blocks = max(1, (tokens - 2) // size)
        options = job.options | {"min_blocks": blocks, "max_blocks": blocks}
        found.append(job._replace(tokens=tokens, options=options))
    return found
