"""The structure of the prunable radix tree: nodes, walks, locks, LRU. Knows nothing of requests.

A live node has one KV slot per key token; a pruned node has none, only children that do. Sizes
(`evictable_size`, `protected_size`) count slots, not tokens. See `radix.py` for what a path means.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from memento_sgl.machine import Eviction
from memento_sgl.markers import MarkerIds
from memento_sgl.radix_key import is_block_start


class Path(NamedTuple):
    """A walk from the root: nodes, and the logical index at which each one ends."""

    nodes: list[TreeNode]
    ends: list[int]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def spans(self) -> Iterator[tuple[TreeNode, int, int]]:
        start = 0
        for node, end in zip(self.nodes, self.ends, strict=True):
            yield node, start, end
            start = end

    def until(self, length: int) -> Path:
        """The part that ends at logical `length`, where one of its nodes must end."""
        count = bisect_right(self.ends, length)
        part = Path(self.nodes[:count], self.ends[:count])
        assert len(part) == length
        return part


def is_pruned(node: TreeNode) -> bool:
    return len(node.value) == 0 and len(node.key) > 0


class PrunableTree(RadixCache):  # type: ignore[misc]
    """SGLang's radix cache whose inner nodes can lose their slots.

    Attributes:
        pruned_nodes, pruned_tokens: nodes of finished blocks pruned since the start, their slots.
        revived_nodes, revived_tokens: pruned nodes that got slots again, and those.
    """

    def __init__(self, params: CacheInitParams, markers: MarkerIds) -> None:
        assert not params.disable
        assert params.page_size == 1
        self._markers = markers
        self.pruned_nodes = self.pruned_tokens = 0
        self.revived_nodes = self.revived_tokens = 0
        super().__init__(params)
        self.kv_events = _PlainEvents(self.kv_events, markers)  # type: ignore[has-type]

    def reset(self) -> None:
        super().reset()
        # Live nodes of finished blocks: those to be pruned with their last lock, and revived ones.
        self._leaving: set[TreeNode] = set()
        self._revived: set[TreeNode] = set()

    def _add_child(
        self, parent: TreeNode, key: RadixKey, slots: torch.Tensor, priority: int
    ) -> TreeNode:
        node = TreeNode(priority=priority)
        node.parent = parent
        node.key = key
        node.value = slots.clone()
        parent.children[key.child_key(1)] = node
        self.evictable_size_ += len(slots)
        self._update_leaf_status(parent)
        if len(slots):
            self._update_leaf_status(node)
        self.kv_events.record_store(node)
        return node

    def _revive(self, node: TreeNode, slots: torch.Tensor) -> None:
        node.value = slots.clone()
        self.revived_nodes += 1
        self.revived_tokens += len(slots)
        self._revived.add(node)
        if node.lock_ref:
            self.protected_size_ += len(slots)
        else:
            self.evictable_size_ += len(slots)
        self._update_leaf_status(node)

    def _close(self, last: TreeNode, finished: Sequence[Eviction]) -> None:
        """Prune the nodes of finished blocks on the path to `last`, which the caller has locked
        once: that lock does not keep a finished block, any other does."""
        i = 0
        for node, start, end in self._ancestors(last).spans():
            while i < len(finished) and finished[i].end <= start:
                i += 1
            while i < len(finished) and finished[i].start < end:
                low, high = max(start, finished[i].start), min(end, finished[i].end)
                if start < low:
                    self._split_node(node.key, node, low - start)
                if high == end:
                    self._leave(node)
                    break
                self._leave(self._split_node(node.key, node, high - low))
                start = high
                i += 1

    def _leave(self, node: TreeNode) -> None:
        if is_pruned(node):
            return
        if node.lock_ref > 1:
            self._leaving.add(node)
        else:
            self._prune(node)

    def _prune(self, node: TreeNode) -> None:
        self.token_to_kv_pool_allocator.free(node.value)
        self.pruned_nodes += 1
        self.pruned_tokens += len(node.value)
        self._forget_slots(node)
        node.value = node.value[:0]
        self._remove_dead(node)

    def _forget_slots(self, node: TreeNode) -> None:
        """Count the node's slots as gone from the tree."""
        if node.lock_ref:
            self.protected_size_ -= len(node.value)
        else:
            self.evictable_size_ -= len(node.value)
        self.evictable_leaves.discard(node)
        self._leaving.discard(node)
        self._revived.discard(node)

    def _remove_dead(self, node: TreeNode) -> TreeNode:
        """Remove pruned nodes without children and locks, upwards; returns the first that stays."""
        while is_pruned(node) and not node.children and node.lock_ref == 0:
            parent = node.parent
            del parent.children[node.key.child_key(1)]
            self.kv_events.record_remove(node)
            node = parent
        if node is not self.root_node and not is_pruned(node):
            self._update_leaf_status(node)
        return node

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `num_tokens` slots if that many are evictable: finished blocks first, then
        leaves by the eviction policy."""
        evicted = 0
        if self._revived:
            for node in sorted(self._revived, key=self._eviction_order):
                if evicted >= params.num_tokens:
                    break
                if node.lock_ref == 0:
                    evicted += len(node.value)
                    self._prune(node)
        rest = params.num_tokens - evicted
        if rest > 0:
            evicted += super().evict(EvictParams(num_tokens=rest)).num_tokens_evicted
        return EvictResult(num_tokens_evicted=evicted)

    def _eviction_order(self, node: TreeNode) -> tuple[Any, int]:
        """Nodes of one walk have one access time; `id` makes all tensor-parallel ranks agree."""
        return self.eviction_strategy.get_priority(node), node.id

    def _delete_leaf(self, node: TreeNode) -> None:
        del node.parent.children[node.key.child_key(1)]
        self._forget_slots(node)
        # The caller looks at `node.parent` for the next leaf: skip pruned parents that go too.
        node.parent = self._remove_dead(node.parent)

    def inc_lock_ref(self, node: TreeNode) -> IncLockRefResult:
        delta = 0
        while node is not self.root_node:
            if node.lock_ref == 0:
                self.evictable_size_ -= len(node.value)
                self.protected_size_ += len(node.value)
                delta -= len(node.value)
            node.lock_ref += 1
            self._update_leaf_status(node)
            node = node.parent
        return IncLockRefResult(delta=delta)

    def dec_lock_ref(
        self, node: TreeNode, params: DecLockRefParams | None = None
    ) -> DecLockRefResult:
        delta = 0
        while node is not self.root_node:
            parent = node.parent
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self.evictable_size_ += len(node.value)
                self.protected_size_ -= len(node.value)
                delta += len(node.value)
                if node in self._leaving:
                    self._prune(node)
                elif is_pruned(node):
                    self._remove_dead(node)
                else:
                    self._update_leaf_status(node)
            node = parent
        return DecLockRefResult(delta=delta)

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        """Cut `split_len` tokens off the front of `child` into a new parent node, returned."""
        front: TreeNode = super()._split_node(key, child, split_len)
        for group in (self._leaving, self._revived):
            if child in group:
                group.add(front)
        return front

    def _walk(self, key: RadixKey, borders: Sequence[int] = ()) -> Path:
        """Follow `key` as far as it goes, splitting where it ends and at `borders` (rising)."""
        now = time.monotonic()
        path = Path([], [])
        node, done = self.root_node, 0
        cuts = iter([*borders, len(key)])
        cut = next(cuts)
        while len(key) and (child := node.children.get(key.child_key(1))) is not None:
            while cut <= done:
                cut = next(cuts)
            taken = min(child.key.match(key), cut - done)
            node = self._split_node(child.key, child, taken) if taken < len(child.key) else child
            node.last_access_time = now
            done += taken
            path.nodes.append(node)
            path.ends.append(done)
            key = key[taken:]
        return path

    def _ancestors(self, node: TreeNode) -> Path:
        """The path to a node."""
        nodes = []
        while node is not self.root_node:
            nodes.append(node)
            node = node.parent
        path = Path(nodes[::-1], [])
        total = 0
        for each in path.nodes:
            total += len(each.key)
            path.ends.append(total)
        return path

    def _row_of(self, path: Path, holes: Sequence[Eviction]) -> torch.Tensor:
        """Slots of a path's tokens outside `holes`; int64 `[rows]`."""
        parts = []
        for node, start, end in path.spans():
            for low, high in _outside(start, end, holes):
                part = node.value[low - start : high - start]
                assert len(part) == high - low, "a row needs a pruned node"
                parts.append(part)
        return torch.cat(parts) if parts else self._empty_device_indices

    def touch_prefix(self, key: RadixKey) -> None:
        """A waiting prompt keeps what it would match from being thrown out: not done here, a key
        without its request says nothing about eviction points."""

    def _print_helper(self, node: TreeNode, indent: int) -> None:
        stack = [(node, indent)]
        while stack:
            current, depth = stack.pop()
            kind = "pruned" if is_pruned(current) else "live"
            print(" " * depth, len(current.key), kind, f"r={current.lock_ref}")
            stack += [(child, depth + 2) for child in current.children.values()]


def _outside(start: int, end: int, holes: Sequence[Eviction]) -> Iterator[tuple[int, int]]:
    """Parts of `[start, end)` outside `holes`."""
    for hole in holes:
        if hole.end <= start or hole.start >= end:
            continue
        if start < hole.start:
            yield start, hole.start
        start = hole.end
    if start < end:
        yield start, end


class _PlainEvents:
    """A recorder of placement events that speaks of tokens; pruning is no event: a prompt through
    the block still hits."""

    def __init__(self, recorder: Any, markers: MarkerIds) -> None:
        self._recorder, self._markers = recorder, markers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def record_store(self, node: TreeNode, medium: Any = None, **kwargs: Any) -> None:
        with self._plain_key(node):
            self._recorder.record_store(node, medium, **kwargs)

    def record_remove(self, node: TreeNode, medium: Any = None) -> None:
        with self._plain_key(node):
            self._recorder.record_remove(node, medium)

    @contextmanager
    def _plain_key(self, node: TreeNode) -> Iterator[None]:
        key = node.key
        if self._recorder.enabled and any(token < 0 for token in key.token_ids):
            ends = (self._markers.summary_end, self._markers.block_start)
            plain = array("q", (t if t >= 0 else ends[is_block_start(t)] for t in key.token_ids))
            node.key = RadixKey(plain, key.extra_key, cache_salt=key.cache_salt)
        try:
            yield
        finally:
            node.key = key
