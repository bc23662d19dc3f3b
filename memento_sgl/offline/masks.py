"""The attention mask of block eviction as one int per token, for trainers with any attention.

    visible(q, k) = (k <= q) and (q < hidden_from[k])

A key is seen by one run of queries: from itself to the eviction point of its span, or to the end of
its document. So documents of a packed row need no term of their own, and a tile of a block mask is
decided by two numbers. In restart mode a memento that was recomputed stands twice (unrolled).

`MaskFields` needs numpy; `sdpa_mask` and `flex_mask` need torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memento_sgl.errors import DataError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markers import MarkerIds

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    from memento_sgl.offline.rollout.record import RolloutRecord

Ints = NDArray[np.int32]
IGNORED = -100


class MaskFields(NamedTuple):
    """One row, or several packed, laid out for one forward pass over U entries; int32 `[U]` each.

    Attributes:
        hidden_from: index of the first entry that no longer sees this one; above its own index.
        positions: rope position, the logical index within the document.
        documents: number of the document, from 0; never to be derived from `positions`, which
            repeat where a memento was recomputed.
        source: index into the tokens given (all documents' tokens put together).
        chooses: where this entry's logits choose the token after it: everywhere, but for the second
            copy of what restart mode recomputes. bool `[U]`.
    """

    hidden_from: Ints
    positions: Ints
    documents: Ints
    source: Ints
    chooses: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.hidden_from)

    def targets(self, labels: Sequence[int], ignored: int = IGNORED) -> NDArray[np.int64]:
        """What each entry's logits are compared with: int64 `[U]`, shifted already.

        Args:
            labels: one per token given, `ignored` where nothing is learned.

        Raises:
            DataError: not as many labels as tokens.
        """
        choosing = np.flatnonzero(self.chooses)  # one entry per token, in their order
        if len(labels) != len(choosing):
            raise DataError(f"{len(labels)} labels for {len(choosing)} tokens")
        found = np.full(len(self), ignored, dtype=np.int64)
        found[choosing[:-1]] = np.asarray(labels, dtype=np.int64)[1:]
        documents = self.documents[choosing]
        found[choosing[:-1][documents[1:] != documents[:-1]]] = ignored
        return found


def mask_fields(evictions: Sequence[Sequence[int]], length: int) -> MaskFields:
    """The fields of one sequence.

    Args:
        evictions: `(point, start, end)` or `(point, start, end, resume)` each, as tokenized rows
            and rollout records hold them, in the order of their points.
        length: tokens of the sequence.

    Raises:
        DataError: an eviction that cannot be one: its order, its bounds.
    """
    newest = np.zeros(length, dtype=np.int64)  # entry of each logical index
    parts: list[NDArray[np.int64]] = []
    hidden: list[tuple[NDArray[np.int64], int]] = []  # entries, and from where nobody sees them
    copies: list[NDArray[np.int64]] = []
    done = total = 0

    def emit(start: int, stop: int) -> NDArray[np.int64]:
        nonlocal total
        entries = np.arange(total, total + stop - start)
        newest[start:stop] = entries
        parts.append(np.arange(start, stop))
        total += stop - start
        return entries

    for point, start, end, resume in _checked(evictions, length):
        emit(done, point)
        hidden.append((newest[start:end].copy(), total))
        if resume < point:
            hidden.append((newest[resume:point].copy(), total))
            copies.append(emit(resume, point))
        done = point
    emit(done, length)
    hidden_from = np.full(total, total, dtype=np.int32)
    for entries, since in hidden:
        hidden_from[entries] = since
    chooses = np.ones(total, dtype=np.bool_)
    for entries in copies:
        chooses[entries] = False
    logical = np.concatenate(parts).astype(np.int32)
    return MaskFields(hidden_from, logical, np.zeros(total, dtype=np.int32), logical, chooses)


def _checked(evictions: Sequence[Sequence[int]], length: int) -> list[tuple[int, int, int, int]]:
    """Evictions with their `resume`; those behind the last token changed nothing."""
    found = []
    before = -1
    for eviction in evictions:
        point, start, end = eviction[:3]
        resume = eviction[3] if len(eviction) > 3 else point
        if not (0 <= start < end <= resume <= point and point >= before):
            raise DataError(
                f"{list(eviction)} is no eviction: [point, start, end] or [point, start, end, "
                "resume] with start < end <= resume <= point, in the order of their points"
            )
        if point < length:
            found.append((point, start, end, resume))
        before = point
    return found


def token_fields(
    tokens: Sequence[int],
    prompt_len: int,
    markers: MarkerIds,
    config: MementoConfig,
    *,
    assistant_start: int | None = None,
) -> MaskFields:
    """The fields of prompt + output by the rule itself; `config` has `mask_delimiters` settled."""
    machine = replay(list(tokens), prompt_len, markers, config, assistant_start=assistant_start)
    return mask_fields(machine.evictions, len(tokens))


def record_fields(record: RolloutRecord) -> MaskFields:
    """The fields of a rollout."""
    return mask_fields(record.evictions, len(record.tokens))


def pack(rows: Sequence[MaskFields]) -> MaskFields:
    """Several rows as one: nobody sees another document; positions start anew in each."""
    if not rows:
        raise DataError("nothing to pack")
    entries = np.cumsum([0, *(len(row) for row in rows)])
    tokens = np.cumsum([0, *(int(row.chooses.sum()) for row in rows)])
    documents = np.cumsum([0, *(int(row.documents[-1]) + 1 if len(row) else 0 for row in rows)])
    return MaskFields(
        hidden_from=_shifted([row.hidden_from for row in rows], entries),
        positions=_shifted([row.positions for row in rows], np.zeros_like(entries)),
        documents=_shifted([row.documents for row in rows], documents),
        source=_shifted([row.source for row in rows], tokens),
        chooses=np.concatenate([row.chooses for row in rows]),
    )


def _shifted(parts: Sequence[Ints], by: NDArray[np.int64]) -> Ints:
    moved = [part + int(offset) for part, offset in zip(parts, by[:-1], strict=True)]
    return np.concatenate(moved).astype(np.int32)


def sdpa_mask(fields: MaskFields, device: str | torch.device = "cpu") -> torch.Tensor:
    """Bool `[1, 1, U, U]`, true where query (row) sees key (column).

    For `scaled_dot_product_attention` and Hugging Face models with `attn_implementation="sdpa"`.
    Not for "eager", which adds a boolean mask as 0 and 1 and lets everything through.
    """
    import torch

    return sdpa_mask_of(torch.from_numpy(fields.hidden_from).to(device))


def sdpa_mask_of(hidden_from: torch.Tensor) -> torch.Tensor:
    """The same from `hidden_from` alone, int `[U]`, on its device."""
    import torch

    entries = torch.arange(len(hidden_from), device=hidden_from.device)
    queries = entries[:, None]
    return ((entries[None] <= queries) & (queries < hidden_from[None]))[None, None]


def flex_mask(
    fields: MaskFields, device: str | torch.device = "cpu", *, block_size: int = 128
) -> BlockMask:
    """The mask for FlexAttention. Only tiles are looked at, never `U x U` entries."""
    import torch

    return flex_mask_of(torch.from_numpy(fields.hidden_from).to(device), block_size=block_size)


def flex_mask_of(hidden_from: torch.Tensor, *, block_size: int = 128) -> BlockMask:
    """The same from `hidden_from` alone, int `[U]`, on its device."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= query) & (query < hidden_from[key])

    length = len(hidden_from)
    some, full = _tiles(hidden_from, block_size)
    return BlockMask.from_kv_blocks(
        *_columns(some & ~full),
        *_columns(full),
        BLOCK_SIZE=block_size,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def tiles(fields: MaskFields, block_size: int = 128) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tiles with a visible pair, and those with nothing else; bool `[n, n]`, row = query."""
    import torch

    some, full = _tiles(torch.from_numpy(fields.hidden_from), block_size)
    return some.numpy(), full.numpy()


def _tiles(hidden_from: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key k is seen by the queries of `[k, hidden_from[k])`, so the largest and the smallest end of
    a tile's keys decide."""
    import torch

    count = -(-len(hidden_from) // block_size)
    ends = hidden_from.new_zeros(count * block_size)
    ends[: len(hidden_from)] = hidden_from
    ends = ends.view(count, block_size)
    rows = torch.arange(count, device=ends.device)
    first = rows[:, None] * block_size  # first query of a row of tiles
    some = (rows[None] <= rows[:, None]) & (ends.amax(1)[None] > first)
    full = (rows[None] < rows[:, None]) & (ends.amin(1)[None] >= first + block_size)
    return some, full


def _columns(tile_set: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles as FlexAttention wants them: their number per row `[1, 1, n]`, and their columns first
    in `[1, 1, n, n]`; int32."""
    import torch

    count = tile_set.sum(-1, dtype=torch.int32)
    order = tile_set.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return count[None, None], order.to(torch.int32)[None, None]
