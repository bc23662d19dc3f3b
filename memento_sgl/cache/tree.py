"""The radix tree: nodes, walks, splits, locks, eviction policies, weight versions. Knows nothing of
requests, and of SGLang the abstract interface of a prefix cache only.

    root -- stem of a namespace -- node -- node ...

Sizes (`evictable_size`, `protected_size`) count slots, not tokens. Every operation costs as much
as the symbols and nodes it touches; a lock that moves down costs what it passes.
"""

from __future__ import annotations

import heapq
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.utils import get_eviction_strategy

from memento_sgl.cache.key import Namespace, common_prefix
from memento_sgl.cache.kv_events import NodeEvents
from memento_sgl.cache.node import Node
from memento_sgl.rule.markers import MarkerIds

NOWHERE = Namespace(-1, None, None)


class RadixTree(BasePrefixCache):  # type: ignore[misc]
    """Nodes that own KV slots, shared by all requests whose keys begin alike.

    Attributes:
        generation: changes whenever a match may have got longer or shorter.
        pruned_nodes, pruned_tokens: nodes of finished blocks pruned since the start, their slots.
        revived_nodes, revived_tokens: pruned nodes that got slots again, and those.
    """

    def __init__(self, params: CacheInitParams, markers: MarkerIds) -> None:
        assert not params.disable
        self.disable = False
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.kv_events = KVCacheEventRecorder(
            enabled=params.enable_kv_cache_events,
            page_size=params.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self._events = NodeEvents(self.kv_events, markers)
        self._markers = markers
        if params.enable_metrics:
            self.init_metrics_collector()
        self._policy = get_eviction_strategy(params.eviction_policy, params.eviction_policy_config)
        self._none = torch.empty(
            0, dtype=torch.int64, device=self.token_to_kv_pool_allocator.device
        )
        self._weight_version = 0
        self.generation = 0
        self.pruned_nodes = self.pruned_tokens = 0
        self.revived_nodes = self.revived_tokens = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything; the caller clears the pool."""
        self._numbers, self._clock = count(), count(1)
        self.root_node = Node(next(self._numbers), None, NOWHERE, array("q"), self._none)
        self._leaves: set[Node] = set()  # without children and locks: what LRU may take
        self._freed: list[torch.Tensor] = []
        self._evictable = self._protected = 0
        self.generation += 1
        self._events.cleared()

    # Weight versions

    @property
    def weight_version(self) -> int:
        """How many times weights were loaded. KV of other versions is never matched, and requests
        that hold some publish nothing."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._weight_version = version
        self.generation += 1
        for stem in list(self.root_node.children.values()):
            if stem.namespace.version != version:
                self._drop(stem)
        self._free_collected()

    def _drop(self, stem: Node) -> None:
        """Free what nobody holds below a stem whose weights are gone; the rest goes with its last
        lock. Routers hear now that all of it is."""
        upwards = list(below(stem))[::-1]
        for node in upwards[:-1]:
            self._events.removed(node)
        for node in upwards:
            if node.lock_ref == 0 and node.parent is not None:
                self._detach(node)

    def _is_stale(self, node: Node) -> bool:
        return node.namespace.version != self._weight_version

    # Structure

    def _stem(self, namespace: Namespace) -> Node:
        """The stem of a namespace, made if there is none."""
        stem = self.root_node.children.get(namespace)
        if stem is None:
            number = next(self._numbers)
            stem = Node(number, self.root_node, namespace, self.root_node.key, self._none)
            self.root_node.children[namespace] = stem
        return stem

    def _child_key(self, key: Sequence[Any], offset: int = 0) -> Any:
        """Under what a node keeps the child whose key begins there; keys are never empty there."""
        page = self.page_size
        return key[offset] if page == 1 else tuple(key[offset : offset + page])

    def _walk(self, node: Node, key: Sequence[Any]) -> list[Node]:
        """The nodes that `key` leads through below `node`, in whole pages; the last one is split
        where it ends."""
        now, done, path = next(self._clock), 0, []
        while len(key) - done >= self.page_size:
            child = node.children.get(self._child_key(key, done))
            if child is None:
                break
            node = self._pass(child, key, done, len(key) - done)
            node.last_access_time = now
            done += len(node.key)
            path.append(node)
        return path

    def _pass(self, child: Node, key: Sequence[Any], offset: int, most: int) -> Node:
        """`child`, or its front if only that agrees with `most` symbols of `key` from `offset`."""
        same = common_prefix(child.key, key, offset, most) // self.page_size * self.page_size
        return child if same == len(child.key) else self._split(child, same)

    def _add(self, parent: Node, key: Sequence[Any], slots: torch.Tensor, priority: int) -> Node:
        node = Node(
            next(self._numbers),
            parent,
            parent.namespace,
            key,
            slots,
            now=next(self._clock),
            priority=priority,
        )
        parent.children[self._child_key(key)] = node
        self._evictable += self._size(node)
        self.generation += 1
        self._update_leaf(parent)
        self._update_leaf(node)
        self._events.stored(node)
        return node

    def _split(self, node: Node, length: int) -> Node:
        """Cut `length` symbols off the front of `node` into a new parent of it, returned."""
        parent = node.parent
        assert parent is not None
        front = Node(
            next(self._numbers), parent, node.namespace, node.key[:length], node.slots[:length]
        )
        front.lock_ref, front.priority, front.hit_count = (
            node.lock_ref,
            node.priority,
            node.hit_count,
        )
        front.last_access_time = node.last_access_time
        front.creation_time = node.creation_time
        parent.children[self._child_key(node.key)] = front
        node.parent = front
        node.key, node.slots = node.key[length:], node.slots[length:]
        front.children[self._child_key(node.key)] = node
        self._events.split(front, node)
        return front

    def _detach(self, node: Node) -> Node:
        """Take a node without children and locks out of the tree and free its slots; returns the
        parent. Stems without children go along."""
        parent = node.parent
        assert parent is not None
        del parent.children[self._child_key(node.key) if node.key else node.namespace]
        self._lose_slots(node)
        self.generation += 1
        if not self._is_stale(node) and node.key:
            self._events.removed(node)
        node.parent = None
        return self._without_child(parent)

    def _without_child(self, parent: Node) -> Node:
        """`parent` has lost a child: returns the lowest node that stays."""
        if parent is not self.root_node and not (parent.key or parent.children or parent.lock_ref):
            return self._detach(parent)
        self._update_leaf(parent)
        return parent

    def _lose_slots(self, node: Node) -> None:
        """Count a node's slots as gone from the tree and collect them to be freed."""
        if len(node.slots):
            self._freed.append(node.slots)
        self._count(node, -self._size(node))
        self._leaves.discard(node)

    def _count(self, node: Node, change: int) -> None:
        if node.lock_ref:
            self._protected += change
        else:
            self._evictable += change

    def _free_collected(self) -> None:
        if self._freed:
            page = self.page_size
            pages = torch.cat([slots[::page] // page for slots in self._freed])
            self._freed = []
            self.token_to_kv_pool_allocator.free_page_ids(pages)

    def _size(self, node: Node) -> int:
        """Slots of the pool that a node keeps others from using: whole pages."""
        page: int = self.page_size
        return -(-len(node.slots) // page) * page

    def _update_leaf(self, node: Node) -> None:
        if len(node.slots) and node.lock_ref == 0 and not node.children:
            self._leaves.add(node)
        else:
            self._leaves.discard(node)

    # What SGLang asks of a cache

    def _result(self, length: int, node: Node) -> MatchResult:
        return MatchResult(
            device_prefix_len=length,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    def touch_prefix(self, key: Any) -> None:
        """Keep what a waiting prompt begins with, as far as it has no finished block."""
        namespace = Namespace(self._weight_version, key.extra_key, key.cache_salt)
        node = self.root_node.children.get(namespace)
        tokens = key.token_ids if self.page_size == 1 else list(key.token_ids)
        now, done = next(self._clock), 0
        while node is not None and common_prefix(node.key, tokens, done, len(key)) == len(node.key):
            node.last_access_time = now
            done += len(node.key)
            if done >= len(key):
                break
            node = node.children.get(self._child_key(tokens, done))

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `num_tokens` slots if that many are evictable, leaves first, in the order
        of `--radix-eviction-policy`."""
        began = time.perf_counter()
        evicted = self._evict(params.num_tokens)
        self._free_collected()
        self.update_eviction_metrics(evicted, began)
        return EvictResult(num_tokens_evicted=evicted)

    def _evict(self, wanted: int) -> int:
        evicted = 0
        heap = [(*self._order(node), node) for node in self._leaves]
        heapq.heapify(heap)
        while evicted < wanted and heap:
            node = heapq.heappop(heap)[-1]
            evicted += self._size(node)
            parent = self._detach(node)
            if parent in self._leaves:
                heapq.heappush(heap, (*self._order(parent), parent))
        return evicted

    def _order(self, node: Node) -> tuple[Any, int]:
        """Nodes of one walk have one access time; `id` makes all tensor-parallel ranks agree."""
        return self._policy.get_priority(node), node.id

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        before = self._evictable
        self._hold(node, self.root_node)
        return IncLockRefResult(delta=self._evictable - before)

    def _hold(self, node: Node, above: Node) -> None:
        """Lock from `node` up to, but not including, `above`."""
        at: Node | None = node
        while at is not above:
            assert at is not None
            size = self._size(at)
            self._count(at, -size)
            at.lock_ref += 1
            self._count(at, size)
            self._leaves.discard(at)
            at = at.parent

    def dec_lock_ref(self, node: Node, params: DecLockRefParams | None = None) -> DecLockRefResult:
        before = self._evictable
        self._release(node, self.root_node)
        self._free_collected()
        return DecLockRefResult(delta=self._evictable - before)

    def _release(self, node: Node, above: Node) -> None:
        """Unlock from `node` up to, but not including, `above`."""
        while node is not above:
            parent = node.parent
            assert parent is not None
            size = self._size(node)
            self._count(node, -size)
            node.lock_ref -= 1
            self._count(node, size)
            if node.lock_ref == 0:
                self._unlocked(node)
            node = parent

    def _unlocked(self, node: Node) -> None:
        """The last lock of a node is gone."""
        if not node.children and (not node.key or self._is_stale(node)):
            self._detach(node)
        else:
            self._update_leaf(node)

    def _move_lock(self, req: Any, node: Node) -> None:
        """A request that holds its last node holds `node`, below it, instead."""
        self._hold(node, req.last_node)
        req.lock.node = req.last_node = node

    def evictable_size(self) -> int:
        return self._evictable

    def protected_size(self) -> int:
        return self._protected

    def total_size(self) -> int:
        return self._evictable + self._protected

    def pretty_print(self) -> None:
        """Nodes with what they hold and how many requests hold them."""
        for node in below(self.root_node):
            kind = "pruned" if node.is_pruned else "live" if node.key else str(node.namespace)
            depth, above = 0, node.parent
            while above is not None:
                depth, above = depth + 2, above.parent
            print(" " * depth, len(node.key), kind, f"r={node.lock_ref}")
        print(f"#tokens: {self.total_size()}")


def below(node: Node) -> Iterator[Node]:
    """A node and all below it, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def up_to(node: Node, start: int) -> list[Node]:
    """The nodes on the path to `node` that end behind `start`, from the top; no stem."""
    path, at = [], node
    while at.key and at.end > start:
        path.append(at)
        assert at.parent is not None
        at = at.parent
    return path[::-1]


def touch(nodes: Iterable[Node], priority: int) -> None:
    """A request of this priority has come by."""
    for node in nodes:
        node.priority = max(node.priority, priority)
        node.hit_count += 1
