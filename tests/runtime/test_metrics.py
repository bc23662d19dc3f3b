"""Names of metrics: in the code, in the docs and in the dashboard."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from memento_sgl.metrics import METRICS, PREFIX

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "memento.json").read_text(encoding="utf-8"))


def queries() -> list[str]:
    """Every query of the dashboard, of panels and of variables."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables: list[dict[str, Any]] = DASHBOARD["templating"]["list"]
    return found + [v["query"] for v in variables if v["type"] == "query"]


def queried() -> set[str]:
    return set(re.findall(r"sglang:\w+", " ".join(queries())))


def test_the_page_lists_every_metric_with_its_label() -> None:
    listed = set(re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE))
    names = set(re.findall(r"`([\w{}]+)`", " ".join(listed)))
    for name, spec in METRICS.items():
        assert (f"{name}{{{spec.label[0]}}}" if spec.label else name) in names, name


def test_the_dashboard_shows_every_metric() -> None:
    shown = {re.sub(r"_bucket$", "", name) for name in queried()}
    assert {PREFIX + name for name in METRICS} <= shown


def test_the_dashboard_is_well_formed() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    for query in queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
