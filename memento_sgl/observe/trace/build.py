"""From what a request's `Watch` gathered to the JSON object of its trace file.

Runs in the writer's thread: plain dictionaries, checked against `RequestTrace` in the tests only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

from memento_sgl.observe.trace.schema import MAX_ENTRIES, MAX_ID, MAX_POINTS
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.machine import Block, Eviction

MARKS = ("block_open", "block_close", "memento_open", "memento_close")
SHAPE = ("mask_delimiters", "compact_on_summary_end", "require_assistant_section", "restart_mode")
"""Options of the server that decide what a trace shows, beside those of a request."""


class Seen(NamedTuple):
    """One thing that happened.

    Attributes:
        time: of the monotonic clock.
        at: logical index; the eviction's number for "evict" and "replay".
        rows: KV tokens in the row before `at`; after the eviction.
        before: KV tokens before the eviction.
    """

    time: float
    kind: str
    at: int
    rows: int
    before: int = 0


class Finished(NamedTuple):
    """All that a trace is made from. Times are of the monotonic clock, 0: it did not happen.

    `evictions` may end with one that no query has seen; `record` does not count it.
    """

    rid: str
    wall: float
    arrived: float
    prefill_start: float
    first_token: float
    end: float
    finish: str
    config: MementoConfig
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    blocks: tuple[Block, ...]
    evictions: tuple[Eviction, ...]
    seen: tuple[Seen, ...]
    record: Mapping[str, Any]


def build_trace(request: Finished, rank: int) -> dict[str, Any]:
    """The object that `RequestTrace` describes."""

    def since(time: float) -> float | None:
        return round(time - request.arrived, 6) if time else None

    marks = {seen.at: since(seen.time) for seen in request.seen if seen.kind in MARKS}
    applied = {seen.at: seen for seen in request.seen if seen.kind == "evict"}
    others = [seen for seen in request.seen if seen.kind not in (*MARKS, "evict", "forced")]
    answers = [seen for seen in request.seen if seen.kind == "answer"]
    counts = Counter(seen.kind for seen in request.seen)
    counted = range(len(request.record["evicted_spans"]))
    counts["cached_evictions"] = sum(number not in applied for number in counted)
    curve = _curve(request)
    blocks, block_step = _thin(request.blocks)
    numbers, eviction_step = _thin(counted)
    events, event_step = _thin(others)
    points, point_step = thin_curve(curve, MAX_POINTS)
    return {
        "format": "memento-trace-1",
        "id": request.rid[:MAX_ID],
        "arrived": request.wall,
        "rank": rank,
        "finish": request.finish,
        "options": _options(request.config),
        "times": {
            "prefill_start": since(request.prefill_start),
            "first_token": since(request.first_token),
            "answer": since(answers[-1].time) if answers else None,
            "end": since(request.end),
        },
        "tokens": _tokens(request, answers[-1].at if answers else None),
        "accounting": {k: v for k, v in request.record.items() if isinstance(v, int)},
        "counts": dict(counts),
        "blocks": [_block(block, marks) for block in blocks],
        "evictions": [_eviction(request.evictions[i], applied.get(i), since) for i in numbers],
        "events": [_event(seen, request.evictions, since) for seen in events],
        "kv": [[since(time), rows] for time, rows in points],
        "every": {
            "blocks": block_step,
            "evictions": eviction_step,
            "events": event_step,
            "kv": point_step,
        },
    }


def _options(config: MementoConfig) -> dict[str, Any]:
    names = [*RequestOptions.model_fields, *SHAPE]
    return config.model_dump(include=set(names) - {"enable"}, exclude_defaults=True)


def _tokens(request: Finished, thought_end: int | None) -> dict[str, int]:
    length = request.prompt_tokens + request.output_tokens
    return {
        "prompt": request.prompt_tokens,
        "cached": request.cached_tokens,
        "output": request.output_tokens,
        "blocks": sum(block.block_tokens for block in request.blocks),
        "mementos": sum(block.summary_tokens for block in request.blocks),
        "answer": 0 if thought_end is None else length - thought_end - 1,
    }


def _block(block: Block, marks: Mapping[int, float | None]) -> dict[str, Any]:
    return {
        **block._asdict(),
        "opened": marks.get(block.start),
        "closed": marks.get(block.end),
        "summary_opened": marks.get(block.summary_start),
        "summary_closed": marks.get(block.summary_end),
    }


def _eviction(eviction: Eviction, seen: Seen | None, since: Any) -> dict[str, Any]:
    return {
        **eviction._asdict(),
        "time": since(seen.time) if seen else None,
        "rows_before": seen.before if seen else None,
        "rows_after": seen.rows if seen else None,
    }


def _event(seen: Seen, evictions: Sequence[Eviction], since: Any) -> dict[str, Any]:
    index = evictions[seen.at].point if seen.kind == "replay" else seen.at
    return {"time": since(seen.time), "kind": seen.kind, "index": index, "rows": seen.rows}


def _curve(request: Finished) -> list[tuple[float, int]]:
    """KV tokens of the row at every moment when their number was known; a voided step adds none,
    and may end before the eviction that voids it is applied."""
    points = []
    for seen in request.seen:
        if seen.kind == "void":
            continue
        if seen.kind in ("evict", "replay"):
            points.append((seen.time, seen.before))
        points.append((seen.time, seen.rows))
        if seen.kind == "retract":
            points.append((seen.time, 0))
    if request.first_token:
        gone = sum(e.tokens for e in request.evictions if e.point < request.prompt_tokens)
        points.append((request.first_token, request.prompt_tokens - gone))
        points.append((request.end, request.record["final_kv_tokens"]))
    return sorted(points, key=lambda point: point[0])


def _thin(entries: Sequence[Any]) -> tuple[Sequence[Any], int]:
    step = max(1, ceil(len(entries) / MAX_ENTRIES))
    return entries[::step], step


def thin_curve(
    points: Sequence[tuple[float, int]], most: int
) -> tuple[Sequence[tuple[float, int]], int]:
    """At most `most` points: the lowest and the highest of every `step`, in order, and `step`."""
    if len(points) <= most:
        return points, 1
    step = 2 * ceil(len(points) / most)
    kept = []
    for start in range(0, len(points), step):
        group = range(start, min(start + step, len(points)))
        ends = {min(group, key=lambda i: points[i][1]), max(group, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept, step
