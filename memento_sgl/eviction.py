"""Block eviction on the engine's tables. Page size 1: slot ids move, no KV byte does.

    row before   [ .. | span | tail | surplus ]     tail: kept, shifts left over the span
    row after    [ .. | tail ]                      span and surplus: slots are freed

Rows below `cache_protected_len` belong to the radix tree: their slots are not freed here, the tree
prunes its nodes instead.

The surplus is what was computed too early: the slot of a step in flight that still saw the block
(overlap scheduling), or the memento's own slots in restart mode. Those steps are voided and redone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from memento_sgl.machine import Eviction
from memento_sgl.request import RequestState
from memento_sgl.runtime import Runtime


class RowEdit(NamedTuple):
    """One request's change of its row; row indices. `length` and `evicted` hold after it.

    The slots of `[free_start, end)` are the request's own.
    """

    slot: int
    start: int
    free_start: int
    end: int
    keep_end: int
    old_length: int
    length: int
    redone: int
    evicted: int


def evict_running(runtime: Runtime, batch: Any) -> None:
    """Apply the evictions that became due to the requests of a decode batch, all in one go.

    Called on the schedule stream before the batch's next decode step is prepared. `seq_lens` and
    its mirrors become new tensors: earlier ones are still referenced by the step in flight.
    """
    edits: list[RowEdit] = []
    shrink = np.zeros(len(batch.reqs), dtype=np.int64)
    rewind = np.zeros(len(batch.reqs), dtype=np.int64)
    for i, req in enumerate(batch.reqs):
        if req not in runtime.due:
            continue
        runtime.due.discard(req)
        if req.finished():
            continue
        edit = _plan(runtime, req, int(batch.seq_lens_cpu[i]), batch.tree_cache)
        edits.append(edit)
        shrink[i] = edit.old_length - edit.length
        rewind[i] = edit.redone
        req.kv_committed_len = req.kv.kv_allocated_len = edit.length
    if not edits:
        return
    _edit_rows(batch, edits)
    runtime.set_offsets([e.slot for e in edits], [e.evicted for e in edits])
    if runtime.observers is not None:
        runtime.observers.step_evicted(len(edits))
    device = batch.seq_lens.device
    less = torch.from_numpy(shrink)
    batch.seq_lens = batch.seq_lens - less.to(device, non_blocking=True)
    batch.seq_lens_cpu = batch.seq_lens_cpu - less
    batch.orig_seq_lens = batch.orig_seq_lens - torch.from_numpy(rewind.astype(np.int32)).to(
        device, non_blocking=True
    )
    batch.seq_lens_sum = None


def _plan(runtime: Runtime, req: Any, row_length: int, tree: Any) -> RowEdit:
    state: RequestState = req.memento
    upcoming = state.next_eviction
    assert upcoming is not None
    start, end = state.row(upcoming.start), state.row(upcoming.end)
    keep_end = state.row(upcoming.resume)
    state.apply()
    redone = row_length - keep_end
    if redone:
        runtime.rewind(req, upcoming)
    if state.watch is not None:
        state.watch.evicted(upcoming, decoding=True)
    return RowEdit(
        slot=req.req_pool_idx,
        start=start,
        free_start=_leave_tree(req, upcoming, start, end, tree),
        end=end,
        keep_end=keep_end,
        old_length=row_length,
        length=keep_end - upcoming.tokens,
        redone=redone,
        evicted=state.evicted,
    )


def _leave_tree(req: Any, eviction: Eviction, start: int, end: int, tree: Any) -> int:
    """Give the tree's part of rows `[start, end)` back to it; returns where the own part begins."""
    own: int = min(max(start, req.cache_protected_len), end)
    if own > start:
        req.cache_protected_len -= own - start
        tree.drop_span(req, eviction)
    return own


def _edit_rows(batch: Any, edits: list[RowEdit]) -> None:
    """Shift the tails and free spans and surplus of several rows with one gather and one free."""
    gone_slot, gone_row, tail_slot, tail_row, shift = [], [], [], [], []
    for e in edits:
        gone = np.concatenate([np.arange(e.free_start, e.end), np.arange(e.keep_end, e.old_length)])
        tail = np.arange(e.end, e.keep_end)
        gone_slot.append(np.full(len(gone), e.slot))
        gone_row.append(gone)
        tail_slot.append(np.full(len(tail), e.slot))
        tail_row.append(tail)
        shift.append(np.full(len(tail), e.end - e.start))
    table = batch.req_to_token_pool.req_to_token
    index = [
        torch.from_numpy(np.concatenate(part)).to(table.device, non_blocking=True)
        for part in (gone_slot, gone_row, tail_slot, tail_row, shift)
    ]
    freed = table[index[0], index[1]].to(torch.int64)
    table[index[2], index[3] - index[4]] = table[index[2], index[3]]
    batch.token_to_kv_pool_allocator.free(freed)


def evict_prefix(runtime: Runtime, req: Any, allocator: Any, tree: Any) -> None:
    """Apply the eviction whose point the computed part of a prompt has reached, if any.

    Between two segments of a prefill: `prefix_indices` (the row so far) loses the span, and in
    restart mode the memento too, which the next segment computes again.
    """
    state: RequestState = req.memento
    upcoming = state.next_eviction
    rows = len(req.prefix_indices)
    if upcoming is None or state.row(upcoming.point) != rows:
        return
    start, end = state.row(upcoming.start), state.row(upcoming.end)
    keep_end = state.row(upcoming.resume)
    state.apply()
    slots = req.prefix_indices
    own = _leave_tree(req, upcoming, start, end, tree)
    allocator.free(torch.cat([slots[own:end], slots[keep_end:]]))
    req.prefix_indices = torch.cat([slots[:start], slots[end:keep_end]])
    lost = rows - len(req.prefix_indices)
    req.kv_committed_len -= lost
    req.kv.kv_allocated_len -= lost
    req.already_computed -= lost
    if state.watch is not None:
        state.watch.evicted(upcoming, decoding=False)
    req._refresh_fill_ids()


def rows_to_next_point(req: Any) -> int | None:
    """How many more rows a prefill may compute before a span has to go; None: no limit."""
    state: RequestState = req.memento
    upcoming = state.next_eviction
    if upcoming is None:
        return None
    return state.row(upcoming.point) - len(req.prefix_indices)
