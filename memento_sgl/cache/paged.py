"""Prefix caching above page size 1: the tree shares whole pages of rows.

A row is a run of full pages, so a page behind an evicted span holds other tokens together than it
would have before. A key therefore has one symbol for each *row*: the token (an encoded eviction
point where there was one), and for the first row behind a span the span's tokens with it:

    row     .. t3 t4 | t11 t12 t13 ..            [t5 .. t10] evicted
    key     .. t3 t4   ((t5 .. t10), t11) t12 t13 ..

Equal keys mean equal KV in an equal layout. Nothing is pruned inside a path: with an eviction a
request leaves the pages from the span's start on, where its row holds something else now, and
what survives of them moves with the memento into pages of its own (`evict_shared`).

A match that ends inside the tokens between a span and its eviction point is none: those queries see
the span. Where the rest of a page decides whether a block is computed again, a request takes a copy
of that page's beginning; for that a row that ends so leaves its last, partial page to the tree.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams

from memento_sgl.cache.key import common_prefix
from memento_sgl.cache.node import Node
from memento_sgl.cache.requests import RequestCache
from memento_sgl.cache.tree import touch, up_to
from memento_sgl.request.state import RequestState
from memento_sgl.rule.markers import MarkerIds

MoveKV = Callable[[torch.Tensor, torch.Tensor], None]


class PagedRadixCache(RequestCache):
    """Nodes of whole pages, and leaves of one partial page each.

    Args:
        move_kv: copies the KV of the second slots to the first ones.
    """

    def __init__(self, params: CacheInitParams, markers: MarkerIds, move_kv: MoveKV) -> None:
        self._move_kv = move_kv
        super().__init__(params, markers)

    def reset(self) -> None:
        super().reset()
        self._leaving: set[Node] = set()  # a finished block's; goes with its last lock and child

    # Matching

    def _match(self, req: Any, stem: Node, limit: int) -> tuple[Node, int, int]:
        """With all evictions below `limit` applied; without the last one whose point is out of
        reach, and so on. Each layout is followed to the next point at most: linear in all."""
        state: RequestState = req.memento
        evictions = state.machine.evictions
        count, stop = state.applied_at(limit), limit
        path: list[Node] = []
        while True:
            at = path[-1] if path else stem
            symbols = self._symbols(req, at.end, stop, count)
            path += self._walk(at, symbols)
            node = path[-1] if path else stem
            applied = self._usable(state, node.end, count)
            part = self._part(state, node, symbols[node.end - at.end :], count)
            if part is not None and (applied is None or part[2] > applied):
                return part
            if applied is not None:
                return node, node.end, applied
            crossed = self._crossed(state, node.end, count)
            count = crossed - 1
            stop = evictions[count].point - 1  # a prefill that began at the point would wait there
            first = evictions[count].start - state.gone(count)
            while path and path[-1].end > first:
                path.pop()

    def _crossed(self, state: RequestState, rows: int, count: int) -> int:
        """Spans that a row of `rows` rows lacks, if `count` evictions are applied."""
        evictions = state.machine.evictions
        return bisect_left(evictions, state.end_of(rows, count), hi=count, key=lambda e: e.start)

    def _usable(self, state: RequestState, rows: int, count: int) -> int | None:
        """How many evictions such a row reflects; None: not all that it lacks are due."""
        crossed = self._crossed(state, rows, count)
        last = state.machine.evictions[crossed - 1].point if crossed else 0
        return crossed if last <= state.end_of(rows, count) else None

    def _part(
        self, state: RequestState, node: Node, symbols: list[Any], count: int
    ) -> tuple[Node, int, int] | None:
        """As `_match`: what the beginning of a page below `node` adds that is usable."""
        child, same = self._begins(node, symbols)
        rows = node.end + same
        while child is not None and rows > node.end:
            if (applied := self._usable(state, rows, count)) is not None:
                if len(child.key) > self.page_size:
                    child = self._split(child, self.page_size)
                return child, rows, applied
            last = self._crossed(state, rows, count) - 1
            rows = state.machine.evictions[last].start - state.gone(last)
        return None

    def _begins(self, node: Node, symbols: list[Any]) -> tuple[Node | None, int]:
        """The child of `node` whose first page has most symbols in common, and how many."""
        best, most = None, 0
        for child in node.children.values():
            same = common_prefix(child.key, symbols, 0, self.page_size)
            if same > most:
                best, most = child, same
        return best, most

    def _symbols(self, req: Any, first: int, stop: int, count: int) -> list[Any]:
        """Key symbols of the rows from `first` on, up to logical index `stop`, of a row that
        reflects `count` evictions."""
        state: RequestState = req.memento
        start = state.end_of(first, count)
        key = self._key(req, start, stop).tolist() if stop > start else []
        evictions = state.machine.evictions
        behind = bisect_right(evictions, start, hi=count, key=lambda e: e.end)
        symbols: list[Any] = []
        at = 0
        for eviction in evictions[behind:count]:
            if eviction.start >= stop:
                break
            span, after = eviction.start - start, eviction.end - start
            symbols += key[at:span]
            symbols.append((tuple(key[span:after]), key[after]))
            at = after + 1
        return symbols + key[at:]

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        """Slots of a matched prefix, which is about to become a row; int64 `[prefix_len]`. A
        partial page is copied now, and the tree's own let go."""
        node, rest = req.last_node, req.prefix_len % self.page_size
        parts = []
        if rest:
            copy = self._allocate(1)
            self._move_kv(copy[:rest], node.slots[:rest])
            parts.append(copy[:rest])
            lock = self.lock(node.parent)
            req.last_node = node.parent
            self.unlock(req.lock)
            req.lock = lock
        path = up_to(req.last_node, 0)
        slots = torch.cat([*(each.slots for each in path), *parts]) if path or parts else self._none
        assert len(slots) == req.prefix_len, (req.rid, len(slots), req.prefix_len)
        return slots

    def _allocate(self, pages: int) -> torch.Tensor:
        allocator, wanted = self.token_to_kv_pool_allocator, pages * self.page_size
        if (missing := wanted - allocator.available_size()) > 0:
            self.evict(EvictParams(num_tokens=missing))
        slots: torch.Tensor | None = allocator.alloc(wanted)
        if slots is None:
            raise RuntimeError(f"no room for {pages} pages that were reserved")
        return slots

    # Publishing

    def _grow(self, req: Any, rows: int) -> None:
        state, first, priority = req.memento, req.kv.cache_protected_len, req.priority or 0
        slots = self._row(req, first, rows)
        stop = state.end_of(rows, state.applied)
        symbols = self._symbols(req, first, stop, state.applied)
        node, done = req.last_node, 0
        passed = []
        while done < len(symbols):
            child = node.children.get(self._child_key(symbols, done))
            if child is None:
                node = self._add(node, symbols[done:], slots[done:], priority)
                break
            node = self._pass(child, symbols, done, len(symbols) - done)
            part = slots[done : done + len(node.key)]
            self._take_over(req, part, first + done, node)
            done += len(node.key)
            passed.append(node)
        self._move_lock(req, node)
        touch(passed, priority)
        self._free_collected()

    def _keep_end(self, req: Any, rows: int) -> None:
        """Leave the last, partial page to the tree if a block would be lost without it."""
        state: RequestState = req.memento
        whole = req.kv.cache_protected_len
        if self._usable(state, whole, state.applied) == self._crossed(state, rows, state.applied):
            return
        if req.last_node is self.root_node:
            self._move_lock(req, self._stem(self._namespace(req)))
        symbols = self._symbols(req, whole, state.end_of(rows, state.applied), state.applied)
        node = req.last_node
        if self._begins(node, symbols)[1] == len(symbols):
            return
        self._add(node, symbols, self._row(req, whole, rows), req.priority or 0)
        req.kv.cache_protected_len = whole + self.page_size

    # Leaving pages

    def _leave_blocks(self, req: Any, count: int) -> None:
        """`evict_shared` has done it."""

    def evict_shared(self, req: Any, start: int, end: int, keep_end: int, rows: int) -> bool:
        """Take rows `[start, end)` and those behind `keep_end` out of a row of `rows` rows whose
        pages from `start` on are the tree's in part: what stays of them is copied into pages of
        the request's own.

        Returns:
            False: there is no room for the copies; nothing has changed.
        """
        page, kv = self.page_size, req.kv
        first, length = start // page * page, start + keep_end - end
        old = self._row(req, first, rows)
        own = old[kv.cache_protected_len - first :: page] // page
        pages = -(-(length - first) // page)
        path = up_to(req.last_node, first)
        freed = sum(node.end - max(node.start, first) for node in path if node.lock_ref == 1)
        room = self.token_to_kv_pool_allocator.available_size() + self._evictable + freed
        if pages > room // page + len(own):
            return False
        self._rise(req, path, first)
        self.token_to_kv_pool_allocator.free_page_ids(own)
        new = self._allocate(pages)[: length - first]
        self._move_kv(new, torch.cat([old[: start - first], old[end - first : keep_end - first]]))
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        row[first:length] = new.to(row.dtype)
        kv.cache_protected_len = kv.cache_inserted_len = first
        return True

    def _rise(self, req: Any, path: list[Node], first: int) -> None:
        """The request lets go of the nodes of `path` behind row `first`, for good."""
        if path[0].start < first:
            self._split(path[0], first - path[0].start)
        above, last = path[0].parent, req.last_node
        assert above is not None
        req.lock.node = req.last_node = above
        self._leaving.update(path)
        self._release(last, above)
        self._free_collected()

    def _unlocked(self, node: Node) -> None:
        if node in self._leaving and not node.children:
            self._detach(node)
        else:
            super()._unlocked(node)

    def _without_child(self, parent: Node) -> Node:
        if parent in self._leaving and not (parent.children or parent.lock_ref):
            return self._detach(parent)
        return super()._without_child(parent)

    def _lose_slots(self, node: Node) -> None:
        super()._lose_slots(node)
        self._leaving.discard(node)

    def _split(self, node: Node, length: int) -> Node:
        front = super()._split(node, length)
        if node in self._leaving:
            self._leaving.add(front)
        return front
