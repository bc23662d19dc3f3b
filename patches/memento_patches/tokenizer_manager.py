"""Seam: answers go out, and what the server says of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from memento_patches.output import KEY
from memento_sgl.serve.arguments import settings_of


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


async def tell_options(
    original: Callable[[Any], Awaitable[list[dict[str, Any]]]], manager: Any
) -> list[dict[str, Any]]:
    """`/server_info`: clients follow evictions by the server's options. SGLang tells the fields of
    its own arguments only."""
    states = await original(manager)
    settings = settings_of(manager.server_args)
    assert settings is not None
    told = [settings.config.model_dump(mode="json"), settings.markers, settings.structure]
    return [state | {"_memento": told} for state in states]
