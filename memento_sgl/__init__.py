"""Evict finished reasoning blocks inside a running request, on SGLang.

The rule and its options need neither torch nor SGLang; `Engine` needs the `serve` extra and
`memento_sgl.offline.reference` needs torch. Names are loaded when they are first used, so that
`memento --help` does not wait for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memento_sgl.errors import MementoError
    from memento_sgl.rule.accounting import Accounting, account, kv_curve
    from memento_sgl.rule.config import MementoConfig, RequestOptions
    from memento_sgl.rule.machine import Block, BlockMachine, Eviction, replay
    from memento_sgl.rule.markers import MarkerIds, resolve_markers
    from memento_sgl.serve.engine import Engine

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
_MODULES = {
    "rule.accounting": ("Accounting", "account", "kv_curve"),
    "rule.config": ("MementoConfig", "RequestOptions"),
    "serve.engine": ("Engine",),
    "errors": ("MementoError",),
    "rule.machine": ("Block", "BlockMachine", "Eviction", "replay"),
    "rule.markers": ("MarkerIds", "resolve_markers"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if (module := _MODULE_OF.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
