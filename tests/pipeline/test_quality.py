"""Recall of facts: what counts as kept, and the report that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memento_pipeline.read.rows import ReadOptions, read_traces
from memento_pipeline.records import Trace
from memento_pipeline.report.page import write_report
from memento_pipeline.report.quality import holds, of_run, pieces, read_reference
from memento_pipeline.run.converted import converted
from memento_pipeline.stages.segment import SegmentOptions
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_pipeline.store.folder import Store
from scenes import options, run, serving

from benchmarks.facts import FACTS, MIN_BLOCK, MIN_TRACE, TRACES, baseline
from memento_sgl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "fact", "kept"),
    [
        ("so x = 12, done", "x = 12", True),
        ("so x=12", "x = 12", True),
        (r"so \(x = 12\).", "$x = 12$", True),
        ("so x = 123", "x = 12", False),
        ("so x = 312", "12", False),
        ("so x = 12.5", "x = 12", False),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("ax = 12", "x = 12", False),
        ("the area is\n84", "area is 84", True),
        ("", "84", False),
    ],
)
def test_a_fact_is_kept_token_for_token(text: str, fact: str, kept: bool) -> None:
    assert holds(pieces(text), pieces(fact)) is kept


def test_the_reference_fits_its_traces() -> None:
    reference = read_reference(FACTS)
    traces = [row for row in read_traces([TRACES], ReadOptions()) if isinstance(row, Trace)]
    assert len(traces) == len(reference) == 20
    for trace in traces:
        assert len(reference[trace.id]) >= 4
        for fact in reference[trace.id]:
            assert holds(pieces(trace.thought), pieces(fact)), (trace.id, fact)


def test_the_baselines_figure() -> None:
    """The one that the guide tells. It moves when splitting, cutting or extracting do."""
    (kept,) = baseline().models
    assert (kept.model, kept.facts) == ("rules", 84)
    guide = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert f"{kept.kept} of {kept.facts} facts" in guide


def test_a_report_shows_recall_by_model(tmp_path: Path) -> None:
    with serving() as server:
        run(
            options(
                tmp_path / "work",
                TRACES,
                server.url,
                read=ReadOptions(min_tokens=MIN_TRACE),
                segment=SegmentOptions(min_tokens=MIN_BLOCK),
                summarize=SummarizeOptions(gate_mean=0, gate_least=0, gate_problems=False),
                limit=12,
            )
        )
    page = write_report(tmp_path / "work", tmp_path / "r.html", 0, FACTS).read_text()
    with Store(tmp_path / "work", create=False) as store:
        recall = of_run(converted(store), read_reference(FACTS))
    (kept,) = recall.models
    assert (kept.model, kept.traces, recall.unfinished) == ("canned", 12, 8)
    assert 0 < kept.kept < kept.facts
    assert f">{kept.recall:.1%}<" in page
    assert "8 traces of the reference have no mementos here" in page
    assert "facts that are lost" in page
    assert "Facts kept" not in write_report(tmp_path / "work", tmp_path / "n.html", 0).read_text()


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (['{"id": "a"}'], "r.jsonl:1: Field required"),
        (['{"id": "a", "facts": []}'], "r.jsonl:1: Tuple should have at least 1"),
        (
            ['{"id": "a", "facts": ["1"]}', '{"id": "a", "facts": ["1"]}'],
            "2: the id 'a' occurs twice",
        ),
        (["no JSON"], "r.jsonl:1: Invalid JSON"),
        ([""], "holds no facts"),
    ],
)
def test_bad_references(tmp_path: Path, lines: list[str], match: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=match):
        read_reference(path)


def test_a_reference_of_other_traces_is_refused(tmp_path: Path) -> None:
    run(options(tmp_path / "w", TRACES, None, read=ReadOptions(min_tokens=MIN_TRACE), limit=1))
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"id": "roots", "facts": ["x = 77"]}))
    with pytest.raises(ConfigError, match="'x = 77' does not occur in the trace 'roots'"):
        write_report(tmp_path / "w", tmp_path / "r.html", 0, path)
