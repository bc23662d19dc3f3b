"""The dataset card: a README with the metadata that Hugging Face's `datasets` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from memento_sgl.templates import template

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
CONFIGS = ("default", "full", "extras", "chat", "messages", "tokenized")


def render_card(name: str, summary: Mapping[str, Any], files: Sequence[Path], folder: Path) -> str:
    """Text of the card for files that lie under `folder`. `summary` is `Stats.summary()`."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = _figure
    written = {file.relative_to(folder).parts[0] for file in files if file.suffix == ".parquet"}
    size = next((label for limit, label in _SIZES if summary["rows"] < limit), "n>1M")
    return environment.from_string(template("dataset_card.md")).render(
        name=name,
        size=size,
        stats=summary,
        configs=[config for config in CONFIGS if config in written],
        baseline="rules" in summary["made_by"],
    )


def _figure(value: float | int | None, digits: int = 0) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"
