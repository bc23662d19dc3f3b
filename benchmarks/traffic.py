"""Requests with the lengths of the paper: about 9 blocks of 1,150 tokens, mementos of 194.

Every request gets its own lengths, drawn once per seed. A memento server forces the structure with
strict emission; a stock server writes as many tokens without any structure: equal work.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from memento_sgl.demo.tokenizer import CONTROL, VISIBLE, VOCABULARY

BLOCKS = (6, 12)
BLOCK_TOKENS = 1150
MEMENTO_TOKENS = 194
ANSWER_TOKENS = 200
SPREAD = 0.5  # lengths are uniform within this fraction of their mean
MARKERS = tuple(range(len(CONTROL), len(CONTROL) + len(VISIBLE)))
LETTERS = range(len(CONTROL) + len(VISIBLE), len(VOCABULARY))


class Job(NamedTuple):
    """One request: prompt ids, new tokens, memento options, samples of the same prompt, tokens
    that no server may write."""

    ids: list[int]
    tokens: int
    options: dict[str, Any]
    samples: int = 1
    banned: tuple[int, ...] = ()

    @property
    def logical(self) -> int:
        """Tokens of all samples at their end, without sharing or eviction."""
        return self.samples * (len(self.ids) + self.tokens)


def reasoning(
    count: int, scale: float, seed: int, *, samples: int = 1, prompt: int = 200
) -> list[Job]:
    """Requests that think in blocks; `scale` multiplies all lengths but the number of blocks."""
    rng = random.Random(seed)

    def around(mean: float) -> int:
        return max(2, round(scale * mean * rng.uniform(1 - SPREAD, 1 + SPREAD)))

    jobs = []
    for _ in range(count):
        blocks, block, memento = rng.randint(*BLOCKS), around(BLOCK_TOKENS), around(MEMENTO_TOKENS)
        options = {
            "constrain": "strict",
            "min_blocks": blocks,
            "max_blocks": blocks,
            "min_block_tokens": block,
            "max_block_tokens": block,
            "min_summary_tokens": memento,
            "max_summary_tokens": memento,
        }
        tokens = 2 + blocks * (block + memento + 4) + around(ANSWER_TOKENS)
        jobs.append(Job(rng.choices(LETTERS, k=around(prompt)), tokens, options, samples))
    return jobs


def plain(count: int, tokens: int, seed: int) -> list[Job]:
    """Requests without any structure. Random weights would write a marker now and then."""
    rng = random.Random(seed)
    return [
        Job(rng.choices(LETTERS, k=rng.randint(20, 60)), tokens, {}, banned=MARKERS)
        for _ in range(count)
    ]
