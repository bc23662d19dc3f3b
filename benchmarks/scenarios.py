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
        if self.server.startswith("stock"):
            return jobs
        extra = self.extra or {}
        return [j._replace(options=(j.options if self.keep else {}) | extra) for j in jobs]


NEVER = {"keep_last_n_blocks": -1}
STOCK = Variant("stock", "stock")
# Without prefix caching SGLang draws `ignore_eos` requests ahead exactly and never over-admits.
STOCK_EXACT = Variant("stock, exact admission", "stock-exact")
MEMENTO = Variant("memento", "memento")
KEEPING = Variant("memento, no eviction", "memento", extra=NEVER)
FREE = Variant("memento, free, no eviction", "memento", keep=False, extra=NEVER)


@dataclass(frozen=True)
class Scenario:
    """One comparison; ratios are taken against the first variant. `pool` is in KV tokens.

    `warm_up`: a round before those that count; not needed after a scenario on the same servers.
    """

    name: str
    what: str
    jobs: list[Job]
    pool: int
    concurrency: int
    variants: tuple[Variant, ...] = (STOCK, MEMENTO)
    rounds: int = 3
    warm_up: bool = True


@dataclass(frozen=True)
class Size:
    """How much of everything; `scale` multiplies the lengths of the paper.

    Attributes:
        requests: in a pool that is too small.
        roomy: requests in a pool that is large enough.
        prompts: with 8 samples each.
        crowd_tokens: logical tokens of all requests together while concurrency is varied.
        lengths: logical tokens of one request while those are varied.
    """

    scale: float
    requests: int
    roomy: int
    prompts: int
    plain_tokens: int
    crowds: tuple[int, ...]
    crowd_tokens: int
    lengths: tuple[int, ...]


SIZES = {
    "cpu": Size(0.1, 40, 8, 5, 300, (1, 4, 16, 64, 256), 10_000, (1_000, 3_000, 9_000)),
    "gpu": Size(1.0, 40, 5, 5, 2000, (1, 4, 16, 64, 256), 100_000, (4_000, 12_000, 36_000)),
}
PAPER_TOKENS = 13_000
"""About how many logical tokens a request has at scale 1."""


def logical(jobs: list[Job]) -> int:
    """KV tokens that all jobs would hold together without sharing or eviction."""
    return sum(job.logical for job in jobs)


def small_pool(size: Size) -> list[Scenario]:
    """Traffic that needs far more than the pool; all of it on the same servers."""
    jobs = reasoning(size.requests, size.scale, seed=1)
    pool = logical(jobs) // 5
    crowd = reasoning(2 * size.requests, size.scale, seed=1)
    several = reasoning(size.prompts, size.scale, seed=2, samples=8, prompt=800)
    three = (STOCK, STOCK_EXACT, MEMENTO)
    what = "pool a fifth of what all requests need"
    twice, samples = "twice as many requests", "8 samples of each prompt"
    return [
        Scenario("pressured", what, jobs, pool, len(jobs), three, rounds=2),
        Scenario("crowded", twice, crowd, pool, len(crowd), rounds=1, warm_up=False),
        Scenario("many samples", samples, several, pool, len(several), rounds=2, warm_up=False),
    ]


def longer(size: Size) -> list[Scenario]:
    """A request that stock SGLang clips."""
    jobs = with_blocks(reasoning(1, size.scale / 2, seed=5), tokens=max(size.lengths))
    pool = max(size.lengths) // 3
    what = "one request three times as long as the pool"
    return [Scenario("long", what, jobs, pool, 1, rounds=1)]


def large_pool(size: Size) -> list[Scenario]:
    """Traffic that never fills the pool: what memento costs, and what shorter attention gains."""
    jobs = reasoning(size.roomy, size.scale, seed=3)
    words = plain(size.requests, size.plain_tokens, seed=4)
    crowds = [
        reasoning(count, min(size.scale, size.crowd_tokens / count / PAPER_TOKENS), seed=6)
        for count in size.crowds
    ]
    lengths = [
        with_blocks(reasoning(2, size.scale / 2, seed=7), tokens=tokens) for tokens in size.lengths
    ]
    pool = max(map(logical, (jobs, words, *crowds, *lengths)))
    pool += pool // 4
    three = (STOCK, MEMENTO, KEEPING)
    return [
        Scenario("unpressured", "pool larger than needed", jobs, pool, 8, three, rounds=8),
        Scenario("no markers", "plain text, memento enabled", words, pool, 8),
        Scenario("strict emission", "what it costs", jobs, pool, 8, (FREE, KEEPING), rounds=8),
        *(one_round(f"{len(crowd)} at a time", "short requests", crowd, pool) for crowd in crowds),
        *(one_round(f"{some[0].tokens} tokens", "2 at a time", some, pool) for some in lengths),
    ]


def one_round(name: str, what: str, jobs: list[Job], pool: int) -> Scenario:
    """All requests at once, on servers that are warm."""
    return Scenario(name, what, jobs, pool, len(jobs), rounds=1, warm_up=False)


def with_blocks(jobs: list[Job], tokens: int) -> list[Job]:
    """The same jobs, as many tokens long, in as many blocks of their own size as fit."""
    found = []
    for job in jobs:
        size = job.options["max_block_tokens"] + job.options["max_summary_tokens"] + 4
        blocks = max(1, (tokens - 2) // size)
        options = job.options | {"min_blocks": blocks, "max_blocks": blocks}
        found.append(job._replace(tokens=tokens, options=options))
    return found
