"""Evict finished reasoning blocks inside a running request, on SGLang.

The rule and its options need neither torch nor SGLang; `Engine` needs the `serve` extra and
`memento_sgl.reference` needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memento_sgl.accounting import Accounting, account, kv_curve
from memento_sgl.config import MementoConfig, RequestOptions
from memento_sgl.errors import MementoError
from memento_sgl.machine import Block, BlockMachine, Eviction, replay
from memento_sgl.markers import MarkerIds, resolve_markers

if TYPE_CHECKING:
    from memento_sgl.engine import Engine

__version__ = "0.1.0"
__all__ = [
    "Accounting",
    "Block",
    "BlockMachine",
    "Engine",
    "Eviction",
    "MarkerIds",
    "MementoConfig",
    "MementoError",
    "RequestOptions",
    "account",
    "kv_curve",
    "replay",
    "resolve_markers",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from memento_sgl.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
