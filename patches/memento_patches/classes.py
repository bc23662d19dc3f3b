"""Subclasses where SGLang asks a method for the class to use."""

from __future__ import annotations

from functools import cache


@cache
def on_top_of(found: type, ours: type) -> type:
    """`ours`, a subclass of SGLang's class, above what another plugin may have put there."""
    return ours if issubclass(ours, found) else type(ours.__name__, (ours, found), {})
