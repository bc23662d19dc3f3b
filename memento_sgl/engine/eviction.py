"""Block eviction on the engine's tables.

    row before   [ .. | span | tail | surplus ]     tail: kept, shifts left over the span
    row after    [ .. | tail ]

Page size 1: slot ids move, no KV byte does; the slots of span and surplus are freed.
Page size P: row r has slot `page[r // P] * P + r % P`, and the allocator relies on it. So the row
keeps its slots, the KV of the tail moves down, and the pages behind the new end are freed.

Rows below `cache_protected_len` belong to the radix tree: their slots are not freed here, the tree
prunes its nodes instead; shared pages are copied as far as they stay (`cache/paged.py`).

The surplus is what was computed too early: the slot of a step in flight that still saw the block
(overlap scheduling), or the memento's own slots in restart mode. Those steps are voided and redone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from memento_sgl.engine.runtime import Runtime
from memento_sgl.engine.staging import staged
from memento_sgl.request.state import RequestState


class RowEdit(NamedTuple):
    """One request's change of its row; row indices. `length` and `evicted` hold after it.

    The slots of `[free_start, end)` are the request's own. `done`: the row holds it already.
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
    done: bool = False


def evict_running(runtime: Runtime, batch: Any) -> list[Any]:
    """Apply the evictions that became due to the requests of a decode batch, all in one go.

    Called on the schedule stream before the batch's next decode step is prepared. `seq_lens` and
    its mirrors become new tensors: earlier ones are still referenced by the step in flight.

    Returns:
        Requests without room for a copy of what they share; they must leave the batch.
    """
    edits: list[RowEdit] = []
    stuck = []
    shrink = np.zeros(len(batch.reqs), dtype=np.int64)
    rewind = np.zeros(len(batch.reqs), dtype=np.int64)
    for i, req in enumerate(batch.reqs):
        if req not in runtime.redo.due:
            continue
        runtime.redo.due.discard(req)
        if req.finished():
            continue
        edit = _plan(runtime, req, int(batch.seq_lens_cpu[i]), batch.tree_cache)
        if edit is None:
            stuck.append(req)
            continue
        edits.append(edit)
        shrink[i] = edit.old_length - edit.length
        rewind[i] = edit.redone
        req.kv.kv_committed_len = req.kv.kv_allocated_len = edit.length
    if not edits:
        return stuck
    if own := [edit for edit in edits if not edit.done]:
        edit_rows(runtime, batch, own)
    runtime.evictions += len(edits)
    runtime.positions.set([e.slot for e in edits], [e.evicted for e in edits])
    if runtime.observers is not None:
        runtime.observers.step_evicted(len(edits))
    device = batch.seq_lens.device
    batch.seq_lens = batch.seq_lens - staged(shrink, device)
    batch.seq_lens_cpu = batch.seq_lens_cpu - torch.from_numpy(shrink)
    batch.orig_seq_lens = batch.orig_seq_lens - staged(rewind, device, torch.int32)
    batch.seq_lens_sum = None
    return stuck


def _plan(runtime: Runtime, req: Any, row_length: int, tree: Any) -> RowEdit | None:
    state: RequestState = req.memento
    upcoming = state.next_eviction
    assert upcoming is not None
    start, end = state.row(upcoming.start), state.row(upcoming.end)
    keep_end = state.row(upcoming.resume)
    shared = _shares_pages(req, start, tree)
    if shared and not tree.evict_shared(req, start, end, keep_end, row_length):
        return None
    state.apply()
    redone = row_length - keep_end
    if redone:
        runtime.redo.rewind(req, upcoming)
    if state.watch is not None:
        state.watch.evicted(upcoming, decoding=True)
    return RowEdit(
        slot=req.kv.req_pool_idx,
        start=start,
        free_start=_leave_tree(req, start, end, tree),
        end=end,
        keep_end=keep_end,
        old_length=row_length,
        length=keep_end - upcoming.tokens,
        redone=redone,
        evicted=state.evicted,
        done=shared,
    )


def _shares_pages(req: Any, start: int, tree: Any) -> bool:
    """Whether a page that holds rows from `start` on belongs to the radix tree."""
    page = tree.page_size
    return bool(page > 1 and req.kv.cache_protected_len > start // page * page)


def _leave_tree(req: Any, start: int, end: int, tree: Any) -> int:
    """Give the tree's part of rows `[start, end)` back to it; returns where the own part begins."""
    own: int = min(max(start, req.kv.cache_protected_len), end)
    if own > start:
        req.kv.cache_protected_len -= own - start
        req.kv.cache_inserted_len = min(req.kv.cache_inserted_len, req.kv.cache_protected_len)
        tree.drop_span(req)
    return own


def edit_rows(runtime: Runtime, batch: Any, edits: list[RowEdit]) -> None:
    """Shift the tails of several rows and free what they leave, with one gather and one free."""
    table, allocator = batch.req_to_token_pool.req_to_token, batch.token_to_kv_pool_allocator
    slots = [e.slot for e in edits]
    source = _at(table, slots, [np.arange(e.end, e.keep_end) for e in edits])
    target = _at(table, slots, [np.arange(e.start, e.length) for e in edits])
    page = allocator.page_size
    if page == 1:
        gone = [
            np.concatenate([np.arange(e.free_start, e.end), np.arange(e.keep_end, e.old_length)])
            for e in edits
        ]
    else:
        gone = [np.arange(_next_page(e.length, page), e.old_length, page) for e in edits]
    freed = table[_at(table, slots, gone)].to(torch.int64)
    if page == 1:
        table[target] = table[source]
    else:
        runtime.scheduler.move_kv(table[target].to(torch.int64), table[source].to(torch.int64))
    allocator.free_page_ids(freed // page)  # each once; `free` would wait for the device to tell


def _at(
    table: torch.Tensor, slots: list[int], rows: list[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of several rows of the table: `rows[i]` of the request in `slots[i]`."""
    index = np.stack([np.repeat(slots, [len(r) for r in rows]), np.concatenate(rows)])
    where, what = staged(index, table.device)
    return where, what


def _next_page(row: int, page: int) -> int:
    """The first row at or after `row` that begins a page."""
    return -(-row // page) * page


def evict_prefix(runtime: Runtime, req: Any, allocator: Any, tree: Any) -> bool:
    """Apply the eviction whose point the computed part of a prompt has reached, if any.

    Between two segments of a prefill: the row so far loses the span, and in restart mode the
    memento too, which the next segment computes again.

    Returns:
        False: there is no room for a copy of what the request shares; nothing has changed.
    """
    state: RequestState = req.memento
    upcoming = state.next_eviction
    rows = req.prefix_len
    if upcoming is None or state.row(upcoming.point) != rows:
        return True
    start, end = state.row(upcoming.start), state.row(upcoming.end)
    keep_end = state.row(upcoming.resume)
    shared = _shares_pages(req, start, tree)
    if shared and not tree.evict_shared(req, start, end, keep_end, rows):
        return False
    state.apply()
    runtime.evictions += 1
    row = tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    own = _leave_tree(req, start, end, tree)
    length = start + keep_end - end
    if (page := allocator.page_size) == 1:
        allocator.free(torch.cat([row[own:end], row[keep_end:rows]]).to(torch.int64))
        row[start:length] = row[end:keep_end].clone()
    elif not shared:
        slots = row[start:rows].to(torch.int64)
        runtime.scheduler.move_kv(slots[: length - start], slots[end - start : keep_end - start])
        allocator.free_page_ids(slots[_next_page(length, page) - start :: page] // page)
    req.prefix_len = length
    lost = rows - length
    req.kv.kv_committed_len -= lost
    req.kv.kv_allocated_len -= lost
    req.already_computed -= lost
    if state.watch is not None:
        state.watch.evicted(upcoming, decoding=False)
    req.refresh_fill_ids()
    return True


def rows_to_next_point(req: Any) -> int | None:
    """How many more rows a prefill may compute before a span has to go; None: no limit."""
    state: RequestState = req.memento
    upcoming = state.next_eviction
    if upcoming is None:
        return None
    return state.row(upcoming.point) - int(req.prefix_len)
