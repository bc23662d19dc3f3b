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

Invariant: free slots + slots in the tree + rows of requests behind their `cache_protected_len` =
pool, each slot once. Sizes (`evictable_size`, `protected_size`) count slots, not tokens.
"""

from __future__ import annotations

import time
from array import array
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
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from memento_sgl.errors import ConfigError
from memento_sgl.machine import Eviction
from memento_sgl.markers import MarkerIds
from memento_sgl.request import RequestState

FIELD = 20
LONGEST = 1 << FIELD
"""Logical tokens that a key can describe: three distances of 20 bits fit in one int64."""


def encode_point(eviction: Eviction, by_block_start: bool) -> int:
    """What stands in a key at an eviction point, a negative number: the span that went, seen from
    there, and whether `<|block_start|>` or `<|summary_end|>` was the token."""
    point, start, end, resume = eviction
    packed = (point - start) << FIELD | (point - end)
    packed = packed << FIELD | (point - resume)
    return -1 - (packed << 1 | by_block_start)


def is_block_start(encoded: int) -> bool:
    """Which token an encoded eviction point stands for."""
    return bool((-1 - encoded) & 1)


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


def is_pruned(node: TreeNode) -> bool:
    return len(node.value) == 0 and len(node.key) > 0


class PrunableRadixCache(RadixCache):  # type: ignore[misc]
    """SGLang's radix cache with pruned nodes. Works on requests that carry a `RequestState`.

    Attributes:
        pruned_tokens: slots freed by pruning finished blocks, since the start.
        revived_tokens: slots that came back into pruned nodes.
    """

    def __init__(self, params: CacheInitParams, markers: MarkerIds) -> None:
        assert not params.disable
        assert params.page_size == 1
        self._markers = markers
        self.pruned_tokens = 0
        self.revived_tokens = 0
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        # Live nodes of finished blocks: those to be pruned with their last lock, and revived ones.
        self._leaving: set[TreeNode] = set()
        self._revived: set[TreeNode] = set()

    # ---- match

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Longest usable prefix of `params.req`; sets which of its evictions the row reflects.

        The row that results holds the surviving tokens of the prefix only. At least one token is
        left to compute, and all tokens whose log-probabilities are asked for.
        """
        req = params.req
        if req is None:
            return self._empty_match_result
        state: RequestState = req.memento
        tokens = req.origin_input_ids + req.output_ids
        limit = req._compute_max_prefix_len(len(tokens)) if len(params.key) else 0
        path = self._walk(self._key(state, tokens, limit, req.extra_key))
        length = _valid_length(path, state.machine.evictions)
        node = self._node_at(path, length)
        applied = [e for e in state.machine.evictions if e.point <= length]
        slots = self._row_of(self._ancestors(node), applied)
        if state.restore(len(applied)):
            req.full_untruncated_fill_ids = array("q")
            req._refresh_fill_ids()
        req.already_computed = -state.evicted  # cached tokens are counted in logical tokens
        return MatchResult(
            device_indices=slots,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    # ---- insert

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """Publish what a prefill computed; the request goes on with the tree's slots."""
        self._hand_over(req, req.extend_range.end)

    def cache_retracted_req(self, req: Any) -> None:
        """Publish a running request that is about to lose its row, so that it can resume."""
        rows = self._hand_over(req, req.kv_committed_len)
        req.kv_committed_len = req.kv.kv_allocated_len = rows

    def cache_finished_req(
        self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        """Publish what a finished request computed and release its lock."""
        if not is_insert or self.disable_finished_insert:
            row = self._row(req, req.cache_protected_len, kv_len_to_handle)
            self.token_to_kv_pool_allocator.free(row)
            if req.last_node is not None:
                self.dec_lock_ref(req.last_node)
            return
        state: RequestState = req.memento
        state.observe(req.output_ids)  # its last token may have closed a memento
        node, _, rows = self._publish(req, kv_len_to_handle)
        length = rows + state.evicted
        self.inc_lock_ref(node)
        self.dec_lock_ref(req.last_node)
        finished = [e for e in state.machine.evictions if e.point <= length]
        self._close(node, finished)
        self.dec_lock_ref(node)

    def _hand_over(self, req: Any, rows: int) -> int:
        """Make the tree the owner of a request's first `rows` rows; returns how many it took."""
        node, slots, rows = self._publish(req, rows)
        kept = req.cache_protected_len
        self.req_to_token_pool.write(
            (req.req_pool_idx, slice(kept, rows)), slots[kept:].to(torch.int32)
        )
        req.cache_protected_len = rows
        self.inc_lock_ref(node)
        self.dec_lock_ref(req.last_node)
        req.prefix_indices = slots
        req.last_node = node
        state: RequestState = req.memento
        self._close(node, state.machine.evictions[: state.applied])
        return rows

    def _publish(self, req: Any, rows: int) -> Published:
        """Insert the first `rows` rows of a request; slots that the tree had already are freed.

        Rows behind an eviction point that was not applied are wrong for their key and are freed.
        """
        state: RequestState = req.memento
        applied = state.machine.evictions[: state.applied]
        usable = rows
        if (upcoming := state.next_eviction) is not None:
            usable = min(rows, state.row(upcoming.point))
        if usable < rows:
            surplus = self._row(req, max(usable, req.cache_protected_len), rows)
            self.token_to_kv_pool_allocator.free(surplus)
        length = usable + state.evicted
        tokens = req.origin_input_ids + req.output_ids
        key = self._key(state, tokens, length, req.extra_key)
        row = self._row(req, 0, usable)
        priority = getattr(req, "priority", 0) or 0
        path, known = self._insert(key, row, applied, priority)
        duplicates = [
            row[max(start, req.cache_protected_len) : end]
            for start, end in known
            if end > req.cache_protected_len
        ]
        if duplicates:
            self.token_to_kv_pool_allocator.free(torch.cat(duplicates))
        node = path.nodes[-1] if path.nodes else self.root_node
        return Published(node, self._row_of(path, applied), usable)

    def _insert(
        self, key: RadixKey, row: torch.Tensor, holes: Sequence[Eviction], priority: int
    ) -> tuple[Path, list[tuple[int, int]]]:
        """Put a row into the tree.

        Args:
            key: the logical prefix.
            row: slots of its tokens outside `holes`; int64 `[len(key) - tokens in holes]`.
            holes: spans without slots, rising and disjoint.

        Returns:
            The path of exactly `key`, and the row intervals that the tree had slots for before.
        """
        path = self._walk(key, borders=_borders(holes))
        known = []
        for node, start, end in path.spans():
            node.priority = max(node.priority, priority)
            if _in_hole(start, holes):
                continue
            first = start - _gone_below(start, holes)
            if is_pruned(node):
                self._revive(node, row[first : first + end - start])
            else:
                known.append((first, first + end - start))
        parent = path.nodes[-1] if path.nodes else self.root_node
        borders = [b for b in _borders(holes) if len(path) < b < len(key)]
        for end in [*borders, *([len(key)] if len(key) > len(path) else [])]:
            start = len(path)
            first = start - _gone_below(start, holes)
            slots = row[:0] if _in_hole(start, holes) else row[first : first + end - start]
            parent = self._add_child(parent, key[start:end], slots, priority)
            path.nodes.append(parent)
            path.ends.append(end)
        return path, known

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
        self._record_store_event(node)
        return node

    def _revive(self, node: TreeNode, slots: torch.Tensor) -> None:
        node.value = slots.clone()
        self.revived_tokens += len(slots)
        self._revived.add(node)
        if node.lock_ref:
            self.protected_size_ += len(slots)
        else:
            self.evictable_size_ += len(slots)
        self._update_leaf_status(node)

    # ---- prune

    def drop_span(self, req: Any, eviction: Eviction) -> None:
        """A running request has dropped `eviction` from its row: free the tree's part of it.

        At once, unless another request holds it; then with its last lock.
        """
        self._close(req.last_node, [eviction])

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
            self._record_remove_event(node)
            node = parent
        if node is not self.root_node and not is_pruned(node):
            self._update_leaf_status(node)
        return node

    # ---- LRU

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `num_tokens` slots if that many are evictable: finished blocks first, then
        leaves by the eviction policy."""
        evicted = 0
        if self._revived:
            order = sorted(self._revived, key=self.eviction_strategy.get_priority)
            for node in order:
                if evicted >= params.num_tokens:
                    break
                if node.lock_ref == 0:
                    evicted += len(node.value)
                    self._prune(node)
        rest = params.num_tokens - evicted
        if rest > 0:
            evicted += super().evict(EvictParams(num_tokens=rest)).num_tokens_evicted
        return EvictResult(num_tokens_evicted=evicted)

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

    # ---- nodes

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

    def _node_at(self, path: Path, length: int) -> TreeNode:
        """The node that ends at logical `length` of a path; splits where none does."""
        for node, start, end in path.spans():
            if end == length:
                return node
            if end > length > start:
                return self._split_node(node.key, node, length - start)
        return self.root_node

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
        return torch.cat(parts) if parts else self._empty_match_result.device_indices

    def _row(self, req: Any, start: int, end: int) -> torch.Tensor:
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, start:end]
        return row.to(torch.int64, copy=True)

    def _key(
        self, state: RequestState, tokens: array[int], length: int, extra_key: str | None
    ) -> RadixKey:
        if length >= LONGEST:
            raise ConfigError(f"memento caches prefixes of less than {LONGEST} tokens")
        tokens = tokens[:length]
        for eviction in state.machine.evictions:
            if (point := eviction.point) < length:
                by_block_start = tokens[point] == self._markers.block_start
                tokens[point] = encode_point(eviction, by_block_start)
        return RadixKey(tokens, extra_key)

    def _record_store_event(self, node: TreeNode, medium: Any = None) -> None:
        with self._plain_key(node):
            super()._record_store_event(node, medium)

    def _record_remove_event(self, node: TreeNode, medium: Any = None) -> None:
        with self._plain_key(node):
            super()._record_remove_event(node, medium)

    @contextmanager
    def _plain_key(self, node: TreeNode) -> Iterator[None]:
        """Events speak of tokens; pruning is no event: a prompt through the block still hits."""
        key = node.key
        if self.enable_kv_cache_events and any(token < 0 for token in key.token_ids):
            ends = (self._markers.summary_end, self._markers.block_start)
            plain = array("q", (t if t >= 0 else ends[is_block_start(t)] for t in key.token_ids))
            node.key = RadixKey(plain, key.extra_key)
        try:
            yield
        finally:
            node.key = key

    def _print_helper(self, node: TreeNode, indent: int) -> None:
        stack = [(node, indent)]
        while stack:
            current, depth = stack.pop()
            kind = "pruned" if is_pruned(current) else "live"
            print(" " * depth, len(current.key), kind, f"r={current.lock_ref}")
            stack += [(child, depth + 2) for child in current.children.values()]


class Published(NamedTuple):
    """Result of an insertion: its last node, the tree's slots of the row, and rows taken."""

    node: TreeNode
    slots: torch.Tensor
    rows: int


def _valid_length(path: Path, evictions: Sequence[Eviction]) -> int:
    """Where a match must end so that every pruned span in it is due for the next query."""
    holes = [(start, end) for node, start, end in path.spans() if is_pruned(node)]

    def usable(start: int, end: int, length: int) -> bool:
        over = (e for e in evictions if e.start <= start and end <= e.end)
        return start >= length or any(e.point <= length for e in over)

    length = len(path)
    while (cut := next((s for s, e in holes if not usable(s, e, length)), None)) is not None:
        length = cut
    return length


def _borders(holes: Sequence[Eviction]) -> list[int]:
    return [border for hole in holes for border in (hole.start, hole.end)]


def _in_hole(index: int, holes: Sequence[Eviction]) -> bool:
    return any(hole.start <= index < hole.end for hole in holes)


def _gone_below(index: int, holes: Sequence[Eviction]) -> int:
    return sum(hole.tokens for hole in holes if hole.end <= index)


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
