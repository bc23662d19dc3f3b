"""The mask as one int per token against the definition, entry by entry."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from test_reference import MARKERS, sees, sequences

from memento_sgl.errors import DataError
from memento_sgl.offline.masks import (
    MaskFields,
    flex_mask,
    mask_fields,
    pack,
    sdpa_mask,
    tiles,
    token_fields,
)
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import Eviction, replay

torch = pytest.importorskip("torch")

OPTIONS: list[dict[str, object]] = [
    {},
    {"mask_delimiters": True},
    {"keep_last_n_blocks": 1},
    {"keep_last_block_for_answer": True},
    {"restart_mode": True},
]


def unrolled(evictions: Sequence[Eviction], length: int) -> tuple[list[int], list[list[bool]]]:
    """The definition, step by step: each entry sees what is held when it is computed."""
    due = {eviction.point: eviction for eviction in evictions}
    held: list[tuple[int, int]] = []  # (entry, logical index) that still count
    logical: list[int] = []
    seen: list[set[int]] = []

    def compute(index: int) -> None:
        held.append((len(logical), index))
        logical.append(index)
        seen.append({entry for entry, _ in held})

    for index in range(length):
        if (eviction := due.get(index)) is not None:
            gone = {*range(eviction.start, eviction.end), *range(eviction.resume, index)}
            held[:] = [pair for pair in held if pair[1] not in gone]
            for again in range(eviction.resume, index):
                compute(again)
        compute(index)
    return logical, [[k in row for k in range(len(logical))] for row in seen]


@pytest.mark.parametrize("options", OPTIONS)
def test_fields_follow_the_definition(options: dict[str, object]) -> None:
    again = 0
    for tokens, prompt_len, machine in sequences(120, **options):
        n = len(tokens)
        fields = mask_fields(machine.evictions, n)
        logical, visible = unrolled(machine.evictions, n)
        assert fields.source.tolist() == fields.positions.tolist() == logical
        assert sdpa_mask(fields)[0, 0].tolist() == visible
        assert fields.source[fields.chooses].tolist() == list(range(n))
        assert {field.dtype.itemsize for field in fields} <= {1, 4}
        base = {"enable": True, "mask_delimiters": False, "require_assistant_section": False}
        config = MementoConfig.model_validate(base | options)
        same = token_fields(tokens, prompt_len, MARKERS, config)
        assert all((a == b).all() for a, b in zip(fields, same, strict=True))
        again += len(fields) - n
    assert (again > 0) == ("restart_mode" in options)


def long_rows(count: int, **options: object) -> list[MaskFields]:
    base = {"enable": True, "mask_delimiters": False, "require_assistant_section": False}
    config = MementoConfig.model_validate(base | options)
    rows = []
    for seed in range(count):
        rng = random.Random(seed)
        tokens = [9] * rng.randint(1, 20)
        for _ in range(rng.randint(0, 6)):
            tokens += [1, *[9] * rng.randint(0, 90), 2, 3, *[9] * rng.randint(0, 20), 4]
        tokens += [9] * rng.randint(0, 50)
        rows.append(mask_fields(replay(tokens, 1, MARKERS, config).evictions, len(tokens)))
    return rows


@pytest.mark.parametrize("options", OPTIONS)
def test_tiles_and_packed_rows(options: dict[str, object]) -> None:
    """Documents do not see each other; each tile is called empty, full or mixed as it is."""
    rows = long_rows(9, **options)
    packed = pack(rows)
    assert packed.positions.tolist() == [p for row in rows for p in row.positions.tolist()]
    assert packed.documents.tolist() == [i for i, row in enumerate(rows) for _ in range(len(row))]
    expected = torch.block_diag(*(sdpa_mask(row)[0, 0] for row in rows)).bool()
    assert sdpa_mask(packed)[0, 0].equal(expected)
    size, total = 16, len(packed)
    some, full = tiles(packed, size)
    for i, j in np.ndindex(some.shape):
        tile = expected[i * size : (i + 1) * size, j * size : (j + 1) * size]
        assert some[i, j] == bool(tile.any())
        assert full[i, j] == (tile.shape == (size, size) and bool(tile.all()))
    block_mask = flex_mask(packed, block_size=size)
    dense = block_mask.to_dense()[0, 0].bool().numpy()
    assert (dense == some).all()
    kv = torch.arange(total)
    assert block_mask.mask_mod(0, 0, kv[:, None], kv[None]).equal(expected)


def test_flex_attention_equals_sdpa() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    fields = pack(long_rows(4))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, len(fields), 16)
    with torch.no_grad():
        found = flex_attention(q, k, v, block_mask=flex_mask(fields, block_size=128))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sdpa_mask(fields)
        )
    assert (found - expected).abs().max() < 1e-5


def test_targets_are_the_next_tokens() -> None:
    """Shifted, nothing across documents, nothing from the second copy of a memento."""
    #          0  1  2  3  4  5  6  7
    tokens = [9, 1, 8, 2, 3, 7, 4, 6]
    config = MementoConfig(
        enable=True, mask_delimiters=False, require_assistant_section=False, restart_mode=True
    )
    fields = token_fields(tokens, 1, MARKERS, config)
    labels = [-100, *tokens[1:]]
    assert fields.targets(labels).tolist() == [1, 8, 2, 3, 7, 4, -100, -100, 6, -100]
    both = pack([fields, mask_fields([], 2)]).targets([*labels, 5, 5])
    assert both.tolist() == [1, 8, 2, 3, 7, 4, -100, -100, 6, -100, 5, -100]
    with pytest.raises(DataError, match="7 labels for 8 tokens"):
        fields.targets(labels[1:])


@pytest.mark.parametrize(
    "evictions",
    [[[5, 3, 3]], [[5, 4, 3]], [[5, -1, 3]], [[2, 1, 3]], [[5, 1, 3, 2]], [[7, 4, 5], [5, 1, 3]]],
)
def test_what_is_no_eviction(evictions: list[list[int]]) -> None:
    with pytest.raises(DataError, match="is no eviction"):
        mask_fields(evictions, 9)


def test_a_row_of_a_tokenized_file() -> None:
    """`attention_mask` takes the columns of a file as they are."""
    from memento_sgl.offline.reference import attention_mask

    row = {"input_ids": list(range(9)), "evictions": [[6, 2, 4], [9, 0, 1]]}
    mask = attention_mask(row["evictions"], len(row["input_ids"]))
    spans = [Eviction(6, 2, 4, 6)]
    assert mask.tolist() == [[sees(spans, q, k) for k in range(9)] for q in range(9)]
