"""The embedded model and its task: small enough for any machine, unsolvable without mementos."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
