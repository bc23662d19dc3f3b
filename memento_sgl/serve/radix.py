"""The radix cache that SGLang's registry gets for `--radix-cache-backend memento`."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memento_sgl.environment import extensions_folder
from memento_sgl.errors import ConfigError
from memento_sgl.serve.arguments import settings_of

logger = logging.getLogger(__name__)


def make_radix_cache(context: Any) -> Any:
    """Radix cache factory of SGLang's registry, for `--radix-cache-backend memento`."""
    from memento_sgl.cache.paged import PagedRadixCache
    from memento_sgl.cache.prefix import PrunableRadixCache
    from memento_sgl.engine.runtime import current

    settings = settings_of(context.server_args)
    if settings is None:
        raise ConfigError("--radix-cache-backend memento needs --enable-memento")
    if context.params.enable_kv_cache_events:
        with saying_what_it_waits_for("the hashes of KV events: a C++ extension is being built"):
            load_hashes()
    if context.params.page_size == 1:
        return PrunableRadixCache(context.params, settings.markers)
    return PagedRadixCache(context.params, settings.markers, current().scheduler.move_kv)


def load_hashes() -> None:
    """Build or load SGLang's extension that names pages in KV events, now rather than when the
    first request ends."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash

    get_native_hash(array("q", [0]), None)


@contextmanager
def saying_what_it_waits_for(what: str, seconds: float = 3.0) -> Iterator[None]:
    """Log a line if what is inside takes longer than `seconds`."""
    folder = extensions_folder()
    timer = threading.Timer(
        seconds,
        logger.warning,
        ("memento: the start waits for %s (or another process builds it, in %s)", what, folder),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
