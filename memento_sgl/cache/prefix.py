"""The prunable radix tree: prefix caching and block eviction at the same time.

A node is live (one KV slot per key token) or pruned (no slots; its tokens exist). Finishing a block
prunes its nodes *inside* a path whose children stay, which SGLang's own tree cannot do:

    prompt -- [ block ] -- <|block_end|> memento <|summary_end|> -- ...
              pruned       live: computed while the block was visible, kept

**Keys.** The KV of a token depends on all tokens before it and on which spans had been evicted when
it was computed. So a key is the logical token sequence, with the token at each eviction point
replaced by a number that says which span went there (`encode_point`). Equal keys mean equal KV:
requests share as far as their evictions agree, whatever their options are.

**Validity.** A match that ends at logical length L may cross a pruned span only if the requesting
sequence evicts that span at a point <= L: the next query is index L and never sees it. Otherwise
the match is cut back to the start of that span.

Invariant: free slots + slots in the tree + rows of requests behind their `kv.cache_protected_len` =
pool, each slot once. Rows below that length are those of the surviving tokens above `last_node`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memento_sgl.cache.node import Node
from memento_sgl.cache.pruned import PrunableTree
from memento_sgl.cache.requests import RequestCache
from memento_sgl.cache.tree import touch, up_to
from memento_sgl.request.state import RequestState
from memento_sgl.rule.machine import Eviction


class PrunableRadixCache(RequestCache, PrunableTree):
    """The prunable tree as SGLang's cache of requests."""

    def _match(self, req: Any, stem: Node, limit: int) -> tuple[Node, int, int]:
        state: RequestState = req.memento
        path = self._walk(stem, self._key(req, 0, limit))
        length = _valid_length(path, state.machine.evictions)
        node = next((node for node in reversed(path) if node.end == length), stem)
        applied = state.applied_at(length)
        return node, length - state.gone(applied), applied

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        """Slots of a matched prefix, until they are in the request's row; int64 `[prefix_len]`."""
        state: RequestState = req.memento
        parts = list(_surviving(up_to(req.last_node, 0), state.machine.evictions[: state.applied]))
        slots = torch.cat(parts) if parts else self._none
        assert len(slots) == req.prefix_len, (req.rid, len(slots), req.prefix_len)
        return slots

    def drop_span(self, req: Any) -> None:
        """A running request has dropped its newest applied eviction from its row: free the tree's
        part of it. At once, unless another request holds it; then with its last lock."""
        self._leave_blocks(req, req.memento.applied)

    def _leave_blocks(self, req: Any, count: int) -> None:
        state: RequestState = req.memento
        self._close(req.last_node, state.machine.evictions[state.left : count])
        state.left = max(state.left, count)

    def _grow(self, req: Any, rows: int) -> None:
        state, first = req.memento, req.kv.cache_protected_len
        slots = self._row(req, first, rows)
        node, priority = req.last_node, req.priority or 0
        begin, end = node.end, rows + state.evicted
        key = self._key(req, begin, end)
        at, done, passed = begin, 0, []
        for stop, is_hole in _pieces(state.machine.evictions[: state.applied], begin, end):
            while at < stop:
                child = node.children.get(self._child_key(key, at - begin))
                if child is None:
                    own = self._none if is_hole else slots[done : done + stop - at]
                    node = self._add(node, key[at - begin : stop - begin], own, priority)
                else:
                    node = self._pass(child, key, at - begin, stop - at)
                    passed.append((node, is_hole, done))
                done += 0 if is_hole else node.end - at
                at = node.end
        self._move_lock(req, node)
        touch((node for node, _, _ in passed), priority)
        for node, is_hole, start in passed:
            part = slots[start : start + len(node.key)]
            if is_hole:
                self._leave(node)
            elif node.is_pruned:
                self._revive(node, part)
            else:
                self._take_over(req, part, first + start, node)
        self._free_collected()


def _valid_length(path: Sequence[Node], evictions: Sequence[Eviction]) -> int:
    """Where a match must end so that every pruned span in it is due for the next query."""
    length = path[-1].end if path else 0
    crossed, i = [], 0
    for node in path:
        if not node.is_pruned:
            continue
        while i < len(evictions) and evictions[i].end <= node.start:
            i += 1
        if i == len(evictions) or node.start < evictions[i].start or evictions[i].end < node.end:
            length = node.start
            break
        crossed.append((node.start, evictions[i].point))
    for start, point in reversed(crossed):
        if start < length < point:
            length = start
    return length


def _pieces(holes: Sequence[Eviction], begin: int, end: int) -> Iterator[tuple[int, bool]]:
    """Cut `[begin, end)` at the borders of `holes` (rising, disjoint): where each piece ends, and
    whether it is a hole."""
    for hole in holes[bisect_right(holes, begin, key=lambda hole: hole.end) :]:
        if hole.start >= end:
            break
        if begin < hole.start:
            yield hole.start, False
        begin = min(hole.end, end)
        yield begin, True
    if begin < end:
        yield end, False


def _surviving(path: Sequence[Node], holes: Sequence[Eviction]) -> Iterator[torch.Tensor]:
    """Slots of a path's tokens outside `holes`, in order."""
    i = 0
    for node in path:
        at, start, end = node.start, node.start, node.end
        while i < len(holes) and holes[i].start < end:
            if at < holes[i].start:
                yield node.slots[at - start : holes[i].start - start]
            at = min(max(at, holes[i].end), end)
            if holes[i].end > end:
                break
            i += 1
        if at < end:
            assert not node.is_pruned, "a row needs a pruned node"
            yield node.slots[at - start :]
