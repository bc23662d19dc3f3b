"""KV placement events for cache-aware routers, from nodes of the own tree to SGLang's recorder.

Events speak of tokens, whatever a key holds at eviction points. Pruning is no event: a prompt
through the block still hits.
"""

from __future__ import annotations

from array import array
from functools import cached_property

from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import split_node_hash_value

from memento_sgl.cache.key import is_block_start
from memento_sgl.cache.node import Node
from memento_sgl.rule.markers import MarkerIds


class NodeEvents:
    """Tells a recorder which nodes were stored and removed.

    A page behind an evicted span holds other tokens than a router cuts from the prompt there: such
    pages, partial ones and all behind them are not told.
    """

    def __init__(self, recorder: KVCacheEventRecorder, markers: MarkerIds) -> None:
        self._recorder = recorder
        self._ends = (markers.summary_end, markers.block_start)

    def stored(self, node: Node) -> None:
        if self._recorder.enabled and self._plain(node):
            self._recorder.record_store(_View(node, self._ends))

    def removed(self, node: Node) -> None:
        if self._recorder.enabled and node.hash_value is not None:
            self._recorder.record_remove(_View(node, self._ends))

    def split(self, front: Node, back: Node) -> None:
        """`back` has just lost the symbols of `front`."""
        pages, page = len(front.key), self._recorder.page_size
        for name in ("hash_value", "event_hash_value"):
            parts = split_node_hash_value(getattr(back, name), pages, page)
            for node, hashes in zip((front, back), parts, strict=True):
                setattr(node, name, hashes)

    def _plain(self, node: Node) -> bool:
        """Whether a router can know a node; one that was told has its hashes."""
        parent, page = node.parent, self._recorder.page_size
        if page == 1:
            return True
        known = parent is not None and (not parent.key or parent.hash_value is not None)
        return known and len(node.key) % page == 0 and all(type(t) is int for t in node.key)

    def cleared(self) -> None:
        self._recorder.record_all_cleared()


class _View:
    """A node as the recorder looks at one."""

    def __init__(self, node: Node, ends: tuple[int, int]) -> None:
        self._node, self._ends = node, ends

    @cached_property
    def key(self) -> RadixKey:
        tokens = (t if t >= 0 else self._ends[is_block_start(t)] for t in self._node.key)
        _, extra_key, salt = self._node.namespace
        return RadixKey(array("q", tokens), extra_key, cache_salt=salt)

    @property
    def parent(self) -> _View | None:
        """A stem has none: that is how the recorder knows the first nodes."""
        parent = self._node.parent
        return None if parent is None or not self._node.key else _View(parent, self._ends)

    @property
    def hash_value(self) -> list[str] | None:
        return self._node.hash_value

    @hash_value.setter
    def hash_value(self, value: list[str]) -> None:
        self._node.hash_value = value

    @property
    def event_hash_value(self) -> list[str] | None:
        return self._node.event_hash_value

    @event_hash_value.setter
    def event_hash_value(self, value: list[str]) -> None:
        self._node.event_hash_value = value
