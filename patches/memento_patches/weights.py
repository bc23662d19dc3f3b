"""Seam: whatever writes to the model's weights, or loses the KV that they computed.

The radix tree names KV by how often that happened (`weight_version`), so that nothing computed
before is matched afterwards. Without a tree requests share no KV, and there is nothing to name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memento_patches.overridden import overridden
from memento_sgl.cache.tree import RadixTree
from memento_sgl.environment import has_accelerator


def around_load(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """A load that fails half-way has written too."""
    try:
        return original(manager, request)
    finally:
        tree = manager.scheduler.tree_cache
        if isinstance(tree, RadixTree):
            tree.weight_version += 1


def around_check(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """SGLang's checker of weights reads, but for one action."""
    if request.action != "reset_tensors":
        return original(manager, request)
    return around_load(original, manager, request)


def around_release(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """SGLang ends with a wait for CUDA wherever torch was built with it: fatal on a CPU."""
    if has_accelerator():
        return original(manager, request)
    with overridden(torch, get_device_module=lambda *_args: torch.cpu):
        return original(manager, request)
