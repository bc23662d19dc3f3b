"""Other values on an object of SGLang, for as long as a call into SGLang takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def overridden(obj: Any, **values: Any) -> Iterator[None]:
    """Attributes of `obj` have these values inside, and their own again behind it, whatever was
    written to them meanwhile and however it ends."""
    before = {name: getattr(obj, name) for name in values}
    try:
        for name, value in values.items():
            setattr(obj, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(obj, name, value)
