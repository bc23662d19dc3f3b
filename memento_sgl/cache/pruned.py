"""Nodes that lose their slots inside a path: what a finished block leaves behind at page size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memento_sgl.cache.node import Node
from memento_sgl.cache.tree import RadixTree, up_to
from memento_sgl.rule.machine import Eviction


class PrunableTree(RadixTree):
    """A tree whose inner nodes can be pruned. Pruned nodes vanish with the last live node below."""

    def reset(self) -> None:
        super().reset()
        # Live nodes of finished blocks: those to be pruned with their last lock, and revived ones.
        self._leaving: set[Node] = set()
        self._revived: set[Node] = set()

    def _revive(self, node: Node, slots: torch.Tensor) -> None:
        node.slots = slots
        self.revived_nodes += 1
        self.revived_tokens += len(slots)
        self.generation += 1
        self._revived.add(node)
        self._count(node, len(slots))
        self._update_leaf(node)

    def _close(self, last: Node, finished: Sequence[Eviction]) -> None:
        """Prune the nodes of finished blocks on the path to `last`, which the caller has locked
        once: that lock does not keep a finished block, any other does.

        Args:
            finished: rising and disjoint; only nodes behind the first one's start are looked at.
        """
        if not finished:
            return
        i = 0
        for node in up_to(last, finished[0].start):
            start, end = node.start, node.end
            while i < len(finished) and finished[i].end <= start:
                i += 1
            while i < len(finished) and finished[i].start < end:
                low, high = max(start, finished[i].start), min(end, finished[i].end)
                if start < low:
                    self._split(node, low - start)
                if high == end:
                    self._leave(node)
                    break
                self._leave(self._split(node, high - low))
                start = high
                i += 1
        self._free_collected()

    def _leave(self, node: Node) -> None:
        """A request that has locked `node` once does not need it any more."""
        if node.is_pruned:
            return
        if node.lock_ref > 1:
            self._leaving.add(node)
        else:
            self._prune(node)

    def _prune(self, node: Node) -> None:
        self.pruned_nodes += 1
        self.pruned_tokens += len(node.slots)
        self.generation += 1
        self._lose_slots(node)
        node.slots = self._none
        self._remove_dead(node)

    def _remove_dead(self, node: Node) -> Node:
        """Remove pruned nodes without children and locks, upwards; returns the first that stays."""
        if node.is_pruned and not node.children and node.lock_ref == 0:
            return self._detach(node)
        return node

    def _without_child(self, parent: Node) -> Node:
        if parent.is_pruned:
            return self._remove_dead(parent)
        return super()._without_child(parent)

    def _unlocked(self, node: Node) -> None:
        if node in self._leaving:
            self._prune(node)
        elif node.is_pruned:
            self._remove_dead(node)
        else:
            super()._unlocked(node)

    def _lose_slots(self, node: Node) -> None:
        super()._lose_slots(node)
        self._leaving.discard(node)
        self._revived.discard(node)

    def _split(self, node: Node, length: int) -> Node:
        front = super()._split(node, length)
        for group in (self._leaving, self._revived):
            if node in group:
                group.add(front)
        return front

    def _evict(self, wanted: int) -> int:
        """Revived blocks first: the request that needed them again is done."""
        evicted = 0
        for node in sorted(self._revived, key=self._order):
            if evicted >= wanted:
                break
            if node.lock_ref == 0:
                evicted += len(node.slots)
                self._prune(node)
        return evicted + super()._evict(wanted - evicted)
