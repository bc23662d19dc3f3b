"""Seam: whatever writes to the model's weights or loses the KV that they computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memento_sgl import runtime


def around_load(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """A load that fails half-way has written too."""
    try:
        return original(manager, request)
    finally:
        runtime.current().weights_changed()


def around_check(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """The checker's `reset_tensors` fills weights with random numbers; its other actions read."""
    if request.action != "reset_tensors":
        return original(manager, request)
    return around_load(original, manager, request)
