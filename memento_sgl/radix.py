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
pool, each slot once. Sizes (`evictable_size`, `protected_size`) count slots, not tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from memento_sgl.machine import Eviction
from memento_sgl.radix_key import LONGEST, encode_point
from memento_sgl.radix_tree import Path, PrunableTree, is_pruned
from memento_sgl.request import RequestState


class PrunableRadixCache(PrunableTree):
    """The prunable tree as SGLang's cache of requests, which carry a `RequestState` each."""

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
        path = self._walk(self._key(req, tokens, limit))
        path = path.until(_valid_length(path, state.machine.evictions))
        node = self._last(path)
        applied = [e for e in state.machine.evictions if e.point <= len(path)]
        slots = self._row_of(path, applied)
        if state.restore(len(applied)):
            req.full_untruncated_fill_ids = array("q")
            req.refresh_fill_ids()
        req.already_computed = -state.evicted  # cached tokens are counted in logical tokens
        return MatchResult(
            device_prefix_len=len(slots),
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        """Slots of a matched prefix, until they are in the request's row."""
        state: RequestState = req.memento
        path = self._ancestors(req.last_node)
        slots = self._row_of(path, state.machine.evictions[: state.applied])
        assert len(slots) == req.prefix_len, (req.rid, len(slots), req.prefix_len)
        return slots

    def checkpoint(self, req: Any, *, up_to: int, **_kwargs: Any) -> None:
        """Publish the first `up_to` rows; the request goes on with the tree's slots, and so does
        one that finished until its caller frees what is behind them and drops the lock."""
        state: RequestState = req.memento
        if not req.finished():
            self._hand_over(req, up_to, state.applied)
            return
        state.observe(req.output_ids)  # its last token may have closed a memento
        self._hand_over(req, up_to, None)

    def cache_retracted_req(self, req: Any) -> None:
        """Publish a running request that is about to lose its row, so that it can resume."""
        self._hand_over(req, req.kv.kv_committed_len, req.memento.applied)

    def _hand_over(self, req: Any, rows: int, closed: int | None) -> None:
        """Make the tree the owner of a request's first rows, as many as are right for their key."""
        node, slots, rows = self._publish(req, rows)
        kv, kept = req.kv, req.kv.cache_protected_len
        self.req_to_token_pool.write(
            (kv.req_pool_idx, slice(kept, rows)), slots[kept:].to(torch.int32)
        )
        kv.cache_protected_len = rows
        kv.cache_inserted_len = rows
        lock = self.lock(node)
        self.unlock(req.lock)
        req.lock, req.last_node = lock, node
        state: RequestState = req.memento
        evictions = state.machine.evictions
        length = rows + state.evicted
        over = (
            evictions[:closed]
            if closed is not None
            else [e for e in evictions if e.point <= length]
        )
        self._close(node, over)

    def drop_span(self, req: Any, eviction: Eviction) -> None:
        """A running request has dropped `eviction` from its row: free the tree's part of it.

        At once, unless another request holds it; then with its last lock.
        """
        self._close(req.last_node, [eviction])

    def _publish(self, req: Any, rows: int) -> Published:
        """Insert the first `rows` rows of a request; slots that the tree had already are freed.

        Rows behind an eviction point that was not applied are wrong for their key: not inserted,
        and their owner frees them.
        """
        state: RequestState = req.memento
        applied = state.machine.evictions[: state.applied]
        tokens = req.origin_input_ids + req.output_ids
        usable = min(rows, len(tokens) - state.evicted)
        if (upcoming := state.next_eviction) is not None:
            usable = min(usable, state.row(upcoming.point))
        length = usable + state.evicted
        key = self._key(req, tokens, length)
        row = self._row(req, 0, usable)
        priority = getattr(req, "priority", 0) or 0
        path, known = self._insert(key, row, applied, priority)
        kept = req.kv.cache_protected_len
        duplicates = [row[max(start, kept) : end] for start, end in known if end > kept]
        if duplicates:
            self.token_to_kv_pool_allocator.free(torch.cat(duplicates))
        node = self._last(path)
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
        parent = self._last(path)
        borders = [b for b in _borders(holes) if len(path) < b < len(key)]
        for end in [*borders, *([len(key)] if len(key) > len(path) else [])]:
            start = len(path)
            first = start - _gone_below(start, holes)
            slots = row[:0] if _in_hole(start, holes) else row[first : first + end - start]
            parent = self._add_child(parent, key[start:end], slots, priority)
            path.nodes.append(parent)
            path.ends.append(end)
        return path, known

    def _last(self, path: Path) -> TreeNode:
        return path.nodes[-1] if path.nodes else self.root_node

    def _row(self, req: Any, start: int, end: int) -> torch.Tensor:
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start:end]
        return row.to(torch.int64, copy=True)

    def _key(self, req: Any, tokens: array[int], length: int) -> RadixKey:
        state: RequestState = req.memento
        assert length < LONGEST  # `serving.enable` sees to it
        tokens = tokens[:length]
        for eviction in state.machine.evictions:
            if (point := eviction.point) < length:
                by_block_start = tokens[point] == self._markers.block_start
                tokens[point] = encode_point(eviction, by_block_start)
        return RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)


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
