"""The slot invariant: every KV page (a slot, at page size 1) has exactly one owner, and a row holds
what the rule says."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist


def check_ownership(scheduler: Any) -> None:
    """Compare free slots, the radix tree and the rows of all live requests. Slow; for tests.

    Raises:
        AssertionError: a page with two owners or none, or a row of unexpected length.
    """
    allocator, page = scheduler.token_to_kv_pool_allocator, scheduler.page_size
    table = scheduler.req_to_token_pool.req_to_token
    owned = [allocator.get_all_free_pages()]
    owned += [pages_of(slots, page) for slots in tree_slots(scheduler.tree_cache)]
    for req in live_requests(scheduler):
        rows = req.kv.kv_allocated_len
        assert req.kv.kv_committed_len == rows, (req.rid, req.kv.kv_committed_len, rows)
        _check_length(req, scheduler)
        own = table[req.kv.req_pool_idx, req.kv.cache_protected_len : rows].to(torch.int64)
        owned.append(pages_of(own, page))
    pages = torch.cat(owned)
    counts = torch.bincount(pages, minlength=allocator.size // page + 1)[1:]
    wrong = (counts != 1).nonzero().flatten() + 1
    assert len(wrong) == 0, f"pages without exactly one owner: {wrong[:20].tolist()}"


def pages_of(slots: torch.Tensor, page: int) -> torch.Tensor:
    """The pages of a row, each once; at page size 1 the slots themselves.

    Raises:
        AssertionError: row r does not lie at offset r % page of one page for each `page` rows.
    """
    if page == 1:  # called for every node of the tree, after every step of the tests
        return slots
    rows = torch.arange(len(slots), device=slots.device)
    first = slots - rows % page
    laid_out = torch.equal(first, first[rows - rows % page]) and not (first % page).any()
    assert laid_out, "a row that is not laid out in pages"
    return first[::page] // page


def check_ranks(scheduler: Any) -> None:
    """Compare the tables of all tensor-parallel ranks: each decides alone what to evict, and all
    have to decide alike. A collective of CPU tensors after every step; for tests.

    Raises:
        AssertionError: ranks that differ in a row, in what it reflects, in the free slots, or in
            the version of their weights.
    """
    group = scheduler.tp_cpu_group
    if (ranks := dist.get_world_size(group)) == 1:
        return
    table = scheduler.req_to_token_pool.req_to_token
    state: dict[str, Any] = {
        req.rid: (
            req.memento.applied,
            _digest(table[req.kv.req_pool_idx, : req.kv.kv_committed_len]),
        )
        for req in live_requests(scheduler)
    }
    state[""] = (
        _digest(scheduler.token_to_kv_pool_allocator.get_all_free_pages()),
        getattr(scheduler.tree_cache, "weight_version", None),  # SGLang's tree has none
    )
    states: list[Any] = [None] * ranks
    dist.all_gather_object(states, state, group=group)
    assert all(other == states[0] for other in states), f"ranks differ: {states}"


def _digest(slots: torch.Tensor) -> int:
    return zlib.crc32(slots.cpu().numpy().tobytes())


def tree_slots(tree: Any) -> list[torch.Tensor]:
    """The slots of every node of a radix tree, whose sizes must agree; none without a tree.

    Raises:
        AssertionError: sizes, links or locks of the tree contradict each other.
    """
    if tree.disable:
        return []
    root = tree.root_node
    found, sizes, stack = [], {True: 0, False: 0}, [root]
    while stack:
        node = stack.pop()
        for child in node.children.values():
            assert child.parent is node
            assert child.end == node.end + len(child.key)
            assert len(child.slots) in (0, len(child.key))
            assert len(child.slots) or child.children or child.lock_ref, "a dead node"
            assert child.lock_ref <= node.lock_ref or node is root
            sizes[child.lock_ref > 0] += -(-len(child.slots) // tree.page_size) * tree.page_size
            found.append(child.slots)
            stack.append(child)
    assert sizes == {True: tree.protected_size(), False: tree.evictable_size()}
    return found


def live_requests(scheduler: Any) -> list[Any]:
    """Requests that hold a row, each once."""
    batches = (scheduler.running_batch, scheduler.last_batch, scheduler.cur_batch_for_debug)
    found = {id(r): r for batch in batches if batch is not None for r in batch.reqs}
    if scheduler.chunked_req is not None:
        found[id(scheduler.chunked_req)] = scheduler.chunked_req
    return [req for req in found.values() if req.kv.req_pool_idx is not None]


def _check_length(req: Any, scheduler: Any) -> None:
    """A decoding request's row holds all logical tokens but the evicted ones and the newest."""
    from memento_sgl.engine.runtime import current

    state, runtime = req.memento, current()
    rows = req.kv.kv_committed_len
    state.measured_peak = max(state.measured_peak, rows)
    if (
        runtime.redo.holds(req)
        or req is scheduler.chunked_req
        or req.finished()
        or not req.output_ids
    ):
        return
    behind = len(req.origin_input_ids) + len(req.output_ids) - state.evicted - rows
    assert behind in (0, 1), (req.rid, behind, rows, state.evicted)
