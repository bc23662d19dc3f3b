"""Keys of the radix tree: how eviction points are written into them, what keeps them apart, how
they are compared; plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from memento_sgl.rule.machine import Eviction

FIELD = 20
LONGEST = 1 << FIELD
"""Logical tokens that a key can describe: three distances of 20 bits fit in one int64."""


class Namespace(NamedTuple):
    """What two requests must have in common, besides their tokens, to have the same KV.

    `version` counts the loads of weights; `extra_key` holds the LoRA adapter and what the client
    asked for.
    """

    version: int
    extra_key: str | None
    cache_salt: str | None


def encode_point(eviction: Eviction, by_block_start: bool) -> int:
    """What stands in a key at an eviction point, a negative number: the span that went, seen from
    there, and whether `<|block_start|>` or `<|summary_end|>` was the token."""
    point, start, end, resume = eviction
    packed = (point - start) << FIELD | (point - end)
    packed = packed << FIELD | (point - resume)
    return -1 - (packed << 1 | by_block_start)


def is_block_start(encoded: int) -> bool:
    """Which token an encoded eviction point stands for."""
    return bool((-1 - encoded) & 1)


def common_prefix(key: Sequence[Any], other: Sequence[Any], offset: int, most: int) -> int:
    """How many symbols of `key` stand in `other` from `offset` on, at most `most`: a few slice
    comparisons of half the length each."""
    low, high = 0, min(len(key), len(other) - offset, most)
    if key[:high] == other[offset : offset + high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if key[low:middle] == other[offset + low : offset + middle]:
            low = middle
        else:
            high = middle
    return low
