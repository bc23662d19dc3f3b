"""The Grafana dashboard of the docs, and what it asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DASHBOARD = json.loads(
    (Path(__file__).parents[1] / "docs" / "grafana" / "memento.json").read_text(encoding="utf-8")
)


def queries() -> list[str]:
    """Every query of the dashboard, of panels and of variables."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables: list[dict[str, Any]] = DASHBOARD["templating"]["list"]
    return found + [v["query"] for v in variables if v["type"] == "query"]


def queried() -> set[str]:
    """Names of the metrics in them."""
    return set(re.findall(r"sglang:\w+", " ".join(queries()))) - {"sglang:_"}
