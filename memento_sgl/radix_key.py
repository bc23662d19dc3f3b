"""How an eviction point is written into a key of the radix tree; plain Python."""

from __future__ import annotations

from memento_sgl.machine import Eviction

FIELD = 20
LONGEST = 1 << FIELD
"""Logical tokens that a key can describe: three distances of 20 bits fit in one int64."""


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
