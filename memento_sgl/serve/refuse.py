"""What a server with memento is refused for, before weights load."""

from __future__ import annotations

import logging
from typing import Any

from memento_sgl.cache.key import LONGEST
from memento_sgl.environment import excluded_from_sglang, misses_forced, served_by_rust
from memento_sgl.errors import ConfigError
from memento_sgl.serve.flags import check_flags, flag

logger = logging.getLogger(__name__)


def refuse_environment() -> None:
    """Raise ConfigError for environment variables of SGLang that leave memento out."""
    if (value := excluded_from_sglang()) is not None:
        raise ConfigError(
            f"SGLANG_PLUGINS={value!r} keeps the memento plugin out: add memento to it"
        )
    if misses_forced():
        raise ConfigError("memento does not support SGLANG_RADIX_FORCE_MISS: unset it")
    if served_by_rust():
        raise ConfigError(
            "memento does not support SGLANG_RUST_SERVER, which goes around the checks of "
            "requests: unset it"
        )


def refuse_flags(given: Any, settled: Any) -> None:
    """Raise ConfigError for a flag that is not supported; name those that nobody has checked.

    Args:
        given: the record of server arguments, as it was written.
        settled: its view after SGLang has filled in its choices.
    """
    import msgspec  # SGLang's; the flags are shown without it too

    defaults = {field.name: field.default for field in msgspec.structs.fields(type(given))}
    if unchecked := check_flags(given, settled, defaults):
        names = ", ".join(map(flag, unchecked))
        logger.warning("memento: not checked with block eviction, see docs/flags.md: %s", names)
    if settled.chunked_prefill_size is not None and settled.chunked_prefill_size <= 0:
        raise ConfigError(
            "memento needs chunked prefill: remove --chunked-prefill-size or make it positive"
        )


def refuse_context(length: int) -> None:
    """Raise ConfigError for a context too long for the keys of the radix tree."""
    if length >= LONGEST:
        raise ConfigError(
            f"memento caches prefixes of less than {LONGEST} tokens: lower --context-length "
            f"({length}) or add --disable-radix-cache"
        )
