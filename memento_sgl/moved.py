"""What the old dotted names of public modules say when they are imported."""

from __future__ import annotations

import warnings


def moved(old: str, new: str) -> None:
    """Warn whoever imported `old`, which stands in a module of that name."""
    # Frames: this one, the thin module, the import machinery, which is skipped, and the user's.
    warnings.warn(f"{old} has moved: import {new}", DeprecationWarning, stacklevel=3)
