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

**Cost.** A request publishes from its last node on, and leaves each finished block once: what it
costs is linear in its tokens and blocks.

Invariant: free slots + slots in the tree + rows of requests behind their `kv.cache_protected_len` =
pool, each slot once. Rows below that length are those of the surviving tokens above `last_node`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult

from memento_sgl.machine import Eviction
from memento_sgl.radix_key import LONGEST, Namespace, encode_point
from memento_sgl.radix_node import Node
from memento_sgl.radix_pruned import PrunableTree
from memento_sgl.radix_tree import touch, up_to
from memento_sgl.request import Match, RequestState


class PrunableRadixCache(PrunableTree):
    """The prunable tree as SGLang's cache of requests, which carry a `RequestState` each."""

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Longest usable prefix of `params.req`; sets which of its evictions the row reflects.

        The row that results holds the surviving tokens of the prefix only. At least one token is
        left to compute, and all tokens whose log-probabilities are asked for. Asked again, the
        answer stands as long as nothing entered or left the tree.
        """
        req = params.req
        if req is None:
            return self._result(0, self.root_node)
        state: RequestState = req.memento
        length = len(req.origin_input_ids) + len(req.output_ids)
        limit = req._compute_max_prefix_len(length) if len(params.key) else 0
        asked = (self.generation, length, limit)
        if state.match is None or state.match.asked != asked:
            node = self._match(req, limit)
            state.match = Match((self.generation, length, limit), node)
        node = state.match.node
        if state.restore(state.applied_at(node.end)):
            req.full_untruncated_fill_ids = array("q")
            req.refresh_fill_ids()
        state.begin_row(self._weight_version)
        req.already_computed = -state.evicted  # cached tokens are counted in logical tokens
        return self._result(node.end - state.evicted, node)

    def _match(self, req: Any, limit: int) -> Node:
        stem = self.root_node.children.get(self._namespace(req))
        if stem is None:
            return self.root_node
        path = self._walk(stem, self._key(req, 0, limit))
        length = _valid_length(path, req.memento.machine.evictions)
        return next((node for node in reversed(path) if node.end == length), stem)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        """Slots of a matched prefix, until they are in the request's row; int64 `[prefix_len]`."""
        state: RequestState = req.memento
        parts = list(_surviving(up_to(req.last_node, 0), state.machine.evictions[: state.applied]))
        slots = torch.cat(parts) if parts else self._none
        assert len(slots) == req.prefix_len, (req.rid, len(slots), req.prefix_len)
        return slots

    def checkpoint(self, req: Any, *, up_to: int, **_kwargs: Any) -> None:
        """Publish the first `up_to` rows; the request goes on with the tree's slots, and so does
        one that finished until its caller frees what is behind them and drops the lock."""
        state: RequestState = req.memento
        if not req.finished():
            self._publish(req, up_to)
            return
        state.observe(req.output_ids)  # its last token may have closed a memento
        self._publish(req, up_to)
        self._leave_blocks(req, state.applied_at(req.last_node.end))

    def cache_retracted_req(self, req: Any) -> None:
        """Publish a running request that is about to lose its row, so that it can resume."""
        if not req.skip_radix_cache_insert:
            self._publish(req, req.kv.kv_committed_len)

    def drop_span(self, req: Any) -> None:
        """A running request has dropped its newest applied eviction from its row: free the tree's
        part of it. At once, unless another request holds it; then with its last lock."""
        self._leave_blocks(req, req.memento.applied)

    def _leave_blocks(self, req: Any, count: int) -> None:
        """The request is done with the blocks of its first `count` evictions."""
        state: RequestState = req.memento
        self._close(req.last_node, state.machine.evictions[state.left : count])
        state.left = max(state.left, count)

    def _publish(self, req: Any, rows: int) -> None:
        """Make the tree the owner of a request's first `rows` rows, as many as are right for their
        key: those behind an eviction point that was not applied are not, nor is KV of old weights.
        """
        state: RequestState = req.memento
        if state.weight_version != self._weight_version:
            return
        if not state.published:
            state.published = True
            touch(up_to(req.last_node, 0), req.priority or 0)
        self._leave_blocks(req, state.applied)
        rows = min(rows, len(req.origin_input_ids) + len(req.output_ids) - state.evicted)
        if (upcoming := state.next_eviction) is not None:
            rows = min(rows, state.row(upcoming.point))
        if rows + state.evicted <= req.last_node.end:
            return
        self._grow(req, rows)
        req.kv.cache_protected_len = req.kv.cache_inserted_len = rows

    def _grow(self, req: Any, rows: int) -> None:
        """Put rows from `cache_protected_len` on below the request's last node; slots that the
        tree has already take their place in the row."""
        state, first = req.memento, req.kv.cache_protected_len
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        slots = row[first:rows].to(torch.int64, copy=True)
        node, priority = req.last_node, req.priority or 0
        if node is self.root_node:
            node = self._stem(self._namespace(req))
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
            if is_hole:
                self._leave(node)
            elif node.is_pruned:
                self._revive(node, slots[start : start + len(node.key)])
            else:
                stop = start + len(node.key)
                self._freed.append(slots[start:stop])
                row[first + start : first + stop] = node.slots
        self._free_collected()

    def _namespace(self, req: Any) -> Namespace:
        return Namespace(self._weight_version, req.extra_key, req.cache_salt)

    def _key(self, req: Any, start: int, end: int) -> array[int]:
        """The key of logical tokens `[start, end)`."""
        state: RequestState = req.memento
        assert end < LONGEST  # `serving.enable` sees to it
        prompt, output = req.origin_input_ids, req.output_ids
        known = len(prompt)
        tokens: array[int] = prompt[start:end] + output[max(start - known, 0) : max(end - known, 0)]
        evictions = state.machine.evictions
        for eviction in evictions[state.applied_at(start - 1) : state.applied_at(end - 1)]:
            at = eviction.point - start
            by_block_start = tokens[at] == self._markers.block_start
            tokens[at] = encode_point(eviction, by_block_start)
        return tokens


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
