"""What the radix tree is to SGLang's requests, at any page size: matches and publishing.

Requests carry a `RequestState` each. A request publishes from its last node on: what it costs is
linear in its tokens and blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult

from memento_sgl.cache.key import LONGEST, Namespace, encode_point
from memento_sgl.cache.node import Node
from memento_sgl.cache.tree import RadixTree, touch, up_to
from memento_sgl.request.state import Match, RequestState


class RequestCache(RadixTree):
    """SGLang's cache of requests, but for how evicted spans stand in the tree."""

    @abstractmethod
    def _match(self, req: Any, stem: Node, limit: int) -> tuple[Node, int, int]:
        """The usable prefix of at most `limit` logical tokens: the node that holds its end, its
        rows, and how many of the request's evictions they reflect."""

    @abstractmethod
    def _grow(self, req: Any, rows: int) -> None:
        """Put rows from `cache_protected_len` up to `rows` below the request's last node, and move
        its lock there; slots that the tree has already take their place in the row."""

    @abstractmethod
    def _leave_blocks(self, req: Any, count: int) -> None:
        """The request is done with the blocks of its first `count` evictions."""

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
        if state.match is None or state.match.asked != (self.generation, length, limit):
            stem = self.root_node.children.get(self._namespace(req))
            found = (self.root_node, 0, 0) if stem is None else self._match(req, stem, limit)
            state.match = Match((self.generation, length, limit), *found)
        _, node, rows, applied = state.match
        if state.restore(applied):
            req.full_untruncated_fill_ids = array("q")
            req.refresh_fill_ids()
        state.begin_row(self._weight_version)
        req.already_computed = -state.evicted  # cached tokens are counted in logical tokens
        whole = rows // self.page_size * self.page_size
        return self._result(rows, node)._replace(cache_protected_len=whole)

    def checkpoint(self, req: Any, *, up_to: int, **_kwargs: Any) -> None:
        """Publish the first `up_to` rows; the request goes on with the tree's slots, and so does
        one that finished until its caller frees what is behind them and drops the lock."""
        state: RequestState = req.memento
        if not req.finished():
            self._publish(req, up_to)
            return
        state.observe(req.output_ids)  # its last token may have closed a memento
        rows = self._publish(req, up_to)
        self._leave_blocks(req, state.applied_at(rows + state.evicted))

    def cache_retracted_req(self, req: Any) -> None:
        """Publish a running request that is about to lose its row, so that it can resume."""
        if not req.skip_radix_cache_insert:
            self._publish(req, req.kv.kv_committed_len, last=True)

    def _publish(self, req: Any, rows: int, *, last: bool = False) -> int:
        """Make the tree the owner of a request's first `rows` rows, as many as are right for their
        key: those behind an eviction point that was not applied are not, nor is KV of old weights.

        Args:
            last: the row ends here, as it does when the request has finished.

        Returns:
            How many are right; the tree may have taken fewer.
        """
        state: RequestState = req.memento
        if state.weight_version != self._weight_version:
            return 0
        if not state.published:
            state.published = True
            touch(up_to(req.last_node, 0), req.priority or 0)
        self._leave_blocks(req, state.applied)
        rows = min(rows, len(req.origin_input_ids) + len(req.output_ids) - state.evicted)
        if (upcoming := state.next_eviction) is not None:
            rows = min(rows, state.row(upcoming.point))
        whole = rows // self.page_size * self.page_size
        if whole > req.kv.cache_protected_len:
            if req.last_node is self.root_node:
                self._move_lock(req, self._stem(self._namespace(req)))
            self._grow(req, whole)
            req.kv.cache_protected_len = req.kv.cache_inserted_len = whole
        if rows > whole and (last or req.finished()):
            self._keep_end(req, rows)
        return rows

    def _keep_end(self, req: Any, rows: int) -> None:
        """A row ends inside a page."""

    def _row(self, req: Any, start: int, end: int) -> torch.Tensor:
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start:end]
        return row.to(torch.int64, copy=True)

    def _take_over(self, req: Any, slots: torch.Tensor, first: int, node: Node) -> None:
        """The tree has what rows from `first` on hold: its slots take their place."""
        self._freed.append(slots)
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        row[first : first + len(slots)] = node.slots

    def _namespace(self, req: Any) -> Namespace:
        return Namespace(self._weight_version, req.extra_key, req.cache_salt)

    def _key(self, req: Any, start: int, end: int) -> array[int]:
        """The key of logical tokens `[start, end)`."""
        state: RequestState = req.memento
        assert end < LONGEST  # `serve.arguments.enable` sees to it
        prompt, output = req.origin_input_ids, req.output_ids
        known = len(prompt)
        tokens: array[int] = prompt[start:end] + output[max(start - known, 0) : max(end - known, 0)]
        evictions = state.machine.evictions
        for eviction in evictions[state.applied_at(start - 1) : state.applied_at(end - 1)]:
            at = eviction.point - start
            by_block_start = tokens[at] == self._markers.block_start
            tokens[at] = encode_point(eviction, by_block_start)
        return tokens
