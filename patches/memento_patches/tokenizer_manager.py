"""Seam: answers go out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memento_patches.output import KEY


def add_record(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: Any,
) -> None:
    """SGLang would gather a list of values per token; the accounting is one value per request."""
    others = {key: values for key, values in customized_info.items() if key != KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    for record in customized_info.get(KEY, {index: ()})[index]:
        meta_info[KEY] = record
