"""A node of the radix tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memento_sgl.cache.key import Namespace

if TYPE_CHECKING:
    import torch


class Node:
    """A run of key symbols and the KV slots of them, int64 `[len(key)]`.

    Three kinds have no slots: the root, the stem of a namespace (its only child without a key),
    and pruned nodes. A node keeps its identity where it ends: a split gives its front to a new one.

    Attributes:
        end: symbols from the stem to the end of this node.
        lock_ref: requests that hold this node, or one below it.
        last_access_time, creation_time: by the tree's own count of operations, the same on all
            tensor-parallel ranks.
        hit_count: requests that have come by, for the eviction policies `lfu` and `slru`.
        hash_value, event_hash_value: kept for SGLang's recorder of KV events.
    """

    __slots__ = (
        "children",
        "creation_time",
        "end",
        "event_hash_value",
        "hash_value",
        "hit_count",
        "id",
        "key",
        "last_access_time",
        "lock_ref",
        "namespace",
        "parent",
        "priority",
        "slots",
    )

    def __init__(
        self,
        number: int,
        parent: Node | None,
        namespace: Namespace,
        key: Sequence[Any],
        slots: torch.Tensor,
        *,
        now: int = 0,
        priority: int = 0,
    ) -> None:
        self.id = number
        self.parent = parent
        self.namespace = namespace
        self.key = key
        self.slots = slots
        self.end: int = len(key) + (parent.end if parent is not None else 0)
        self.children: dict[Any, Node] = {}
        self.lock_ref = 0
        self.last_access_time = self.creation_time = now
        self.hit_count = 0
        self.priority = priority
        self.hash_value: list[str] | None = None
        self.event_hash_value: list[str] | None = None

    @property
    def start(self) -> int:
        return self.end - len(self.key)

    @property
    def is_pruned(self) -> bool:
        return len(self.slots) == 0 and len(self.key) > 0
