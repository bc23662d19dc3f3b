"""Names of metrics: in the code, in the docs and in the dashboard."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dashboard import DASHBOARD, queried, queries

from memento_sgl.observe.debug_lines import DebugSink
from memento_sgl.observe.metrics import METRICS, PREFIX, Metrics
from memento_sgl.observe.metrics_sink import TREE_COUNTS, MetricsSink
from memento_sgl.observe.observers import Observers, observers_of
from memento_sgl.observe.trace.entries import TraceSink
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import NO_STRUCTURE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_page_lists_every_metric_with_its_label() -> None:
    listed = set(re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE))
    names = set(re.findall(r"`([\w{}]+)`", " ".join(listed)))
    for name, spec in METRICS.items():
        assert (f"{name}{{{spec.label[0]}}}" if spec.label else name) in names, name


def test_the_dashboard_shows_every_metric() -> None:
    shown = {re.sub(r"_bucket$", "", name) for name in queried()}
    assert {PREFIX + name for name in METRICS} <= shown


def test_the_dashboard_knows_both_spellings() -> None:
    """prometheus_client from 0.23 on writes `_` for `:` unless the scraper understands UTF-8."""
    for query in queries():
        with_colon = sorted(re.findall(r"sglang:(\w+)", query))
        assert with_colon == sorted(re.findall(r"sglang_(\w+)", query)), query
        assert with_colon or "sglang[:_]" in query


def test_the_dashboard_is_well_formed() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    for query in queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")


class Recorded:
    """Stands in for a class of prometheus_client; remembers what was asked of it."""

    calls: list[tuple[Any, ...]]

    def __init__(self, name: str, documentation: str, labelnames: list[str], **_more: Any) -> None:
        assert documentation
        self.name, self.labelnames = name.removeprefix(PREFIX), labelnames

    def labels(self, **labels: Any) -> SimpleNamespace:
        assert list(labels) == self.labelnames
        own = [v for k, v in labels.items() if k in ("part", "step", "outcome")]

        def remember(amount: float = 1) -> None:
            self.calls.append((self.name, *own, amount))

        return SimpleNamespace(inc=remember, set=remember, observe=remember)


@pytest.fixture
def recorded() -> tuple[Metrics, list[tuple[Any, ...]]]:
    Recorded.calls = []
    kinds = ("counter", "gauge", "histogram")
    return Metrics(
        {"model_name": "m", "tp_rank": 0}, dict.fromkeys(kinds, Recorded)
    ), Recorded.calls


def test_the_gauge_sums_and_the_tree_is_read_once(
    recorded: tuple[Metrics, list[tuple[Any, ...]]],
) -> None:
    metrics, calls = recorded
    sink = MetricsSink(metrics)
    observers = Observers([sink], NO_STRUCTURE)
    for change in (30, 0, 12, -30):
        sink.saved(change)
    assert calls == [("saved_kv_tokens", 30), ("saved_kv_tokens", 42), ("saved_kv_tokens", 12)]
    calls.clear()
    tree = SimpleNamespace(**dict.fromkeys(TREE_COUNTS, 0))
    observers.read_tree(tree)
    tree.pruned_nodes, tree.pruned_tokens = 2, 9
    observers.read_tree(tree)
    observers.read_tree(tree)
    assert calls == [("pruned_nodes_total", 2), ("pruned_tokens_total", 9)]


def observers(
    config: MementoConfig, *, metrics: bool, tp_rank: int = 0, dp_rank: int | None = None
) -> Observers | None:
    """Those of a scheduler at this place."""
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(attn_tp_rank=tp_rank, dp_rank=dp_rank):
        return observers_of(scheduler(metrics, tp_rank), config, NO_STRUCTURE)


def scheduler(metrics: bool, tp_rank: int) -> SimpleNamespace:
    collector = SimpleNamespace(
        labels={"tp_rank": tp_rank},
        _counter_cls=Recorded,
        _gauge_cls=Recorded,
        _histogram_cls=Recorded,
    )
    return SimpleNamespace(
        metrics_reporter=SimpleNamespace(
            current_scheduler_metrics_enabled=metrics, metrics_collector=collector
        ),
    )


def test_nobody_observes_unless_asked(tmp_path: Path) -> None:
    plain = MementoConfig(enable=True)
    assert observers(plain, metrics=False) is None
    asked = MementoConfig(enable=True, debug=True, trace_dir=str(tmp_path / "t"))
    assert observers(asked, metrics=False, tp_rank=1) is None
    assert not (tmp_path / "t").exists()
    only_metrics = observers(asked, metrics=True, tp_rank=1)
    assert only_metrics is not None
    assert [type(sink) for sink in only_metrics.sinks] == [MetricsSink]
    assert not only_metrics.at_once
    rest = observers(asked, metrics=False, dp_rank=1)
    assert rest is not None
    assert [type(sink) for sink in rest.sinks] == [TraceSink, DebugSink]
    assert rest.at_once
    assert (tmp_path / "t").is_dir()
