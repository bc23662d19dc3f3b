"""What a request held in KV, token by token, with and without eviction: closed form, no engine.

Query `q` (the step that reads the token at logical index q) holds `|visible(q)|` KV tokens, itself
included. A request of T logical tokens runs the queries 0 .. T-2: its last token is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memento_sgl.rule.machine import BlockMachine, Eviction


@dataclass(frozen=True, slots=True)
class Accounting:
    """One request's KV use. Units: tokens, and token-steps for `auc` (one step per new token).

    `evicted_spans` and `eviction_points` are logical indices, in the order of eviction. Bytes are
    tokens x layers x KV heads x head size x 2 x bytes per element (paper A.3.1).
    """

    blocks: int
    block_tokens: list[int]
    summary_tokens: list[int]
    evicted_spans: list[tuple[int, int]]
    eviction_points: list[int]
    evicted_tokens: int
    recomputed_tokens: int
    peak_kv_tokens: int
    final_kv_tokens: int
    kv_auc: int
    peak_kv_tokens_without: int
    final_kv_tokens_without: int
    kv_auc_without: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def kv_curve(evictions: Sequence[Eviction], length: int) -> list[int]:
    """KV tokens held by each query of a sequence of `length` tokens: `|visible(q)|`, q < length."""
    held = list(range(1, length + 1))
    gone = 0
    points = {eviction.point: eviction.tokens for eviction in evictions}
    for index in range(length):
        gone += points.get(index, 0)
        held[index] -= gone
    return held


def account(machine: BlockMachine, prompt_len: int, length: int) -> Accounting:
    """Account for a request of `length` logical tokens, `prompt_len` of them given.

    Only evictions that a query has seen count: one triggered by the very last token freed nothing.
    """
    queries = max(length - 1, 0)
    seen = [e for e in machine.evictions if e.point < queries]
    peak = auc = gone = 0
    start = 0
    first = max(prompt_len - 1, 0)  # the query that produces the first output token
    for stop in [*(e.point for e in seen), queries]:
        if stop > start:  # queries start .. stop-1 hold q + 1 - gone
            peak = max(peak, stop - gone)
            low = max(start, first)
            if stop > low:
                auc += (low + 1 + stop) * (stop - low) // 2 - gone * (stop - low)
            start = stop
        gone += next((e.tokens for e in seen if e.point == stop), 0)
    return Accounting(
        blocks=len(machine.blocks),
        block_tokens=[b.block_tokens for b in machine.blocks],
        summary_tokens=[b.summary_tokens for b in machine.blocks],
        evicted_spans=[(e.start, e.end) for e in seen],
        eviction_points=[e.point for e in seen],
        evicted_tokens=gone,
        recomputed_tokens=sum(e.point - e.resume for e in seen),
        peak_kv_tokens=peak,
        final_kv_tokens=queries - gone,
        kv_auc=auc,
        peak_kv_tokens_without=queries,
        final_kv_tokens_without=queries,
        kv_auc_without=(first + 1 + queries) * max(queries - first, 0) // 2,
    )
