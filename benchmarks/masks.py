"""The training mask at the paper's lengths: bytes and share of causal tiles, beside a dense mask.

python -m benchmarks.masks
"""

from __future__ import annotations

import time

import torch

from memento_sgl.offline.masks import flex_mask, tiles, token_fields
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markers import MarkerIds

BLOCK, MEMENTO, BLOCKS = 1150, 194, 23  # paper: average block and memento
PROMPT, ANSWER = 0, 50
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
MARKERS = MarkerIds(1, 2, 3, 4)


def paper_row() -> list[int]:
    block = [1, *[9] * BLOCK, 2, 3, *[9] * MEMENTO, 4]
    return [9] * PROMPT + block * BLOCKS + [9] * ANSWER


def main() -> None:
    tokens = paper_row()
    assert len(replay(tokens, 1, MARKERS, CONFIG).evictions) == BLOCKS
    flex_mask(token_fields(tokens[:300], 1, MARKERS, CONFIG))  # imports
    started = time.perf_counter()
    fields = token_fields(tokens, 1, MARKERS, CONFIG)
    between = time.perf_counter()
    mask = flex_mask(fields)
    ended = time.perf_counter()
    some, full = tiles(fields)
    causal = len(some) * (len(some) + 1) // 2
    tables = sum(t.nbytes for t in mask.as_tuple() if isinstance(t, torch.Tensor))
    print(f"{len(tokens):,} tokens, {BLOCKS} blocks of {BLOCK}, mementos of {MEMENTO}")
    for what, size, seconds in (
        ("hidden_from alone", fields.hidden_from.nbytes, None),
        ("all fields", sum(field.nbytes for field in fields), between - started),
        ("BlockMask", tables, ended - between),
        ("dense boolean mask", len(tokens) ** 2, None),
    ):
        print(f"{what:20} {size / 1e3:10,.0f} kB", f"{seconds * 1e3:6.0f} ms" if seconds else "")
    print(
        f"causal tiles of 128 that remain: {some.sum() / causal:.1%} ({full.sum()} of them whole)"
    )


if __name__ == "__main__":
    main()
