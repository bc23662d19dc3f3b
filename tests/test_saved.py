"""What users of earlier releases saved is read as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.errors import DataError
from memento_sgl.observe.trace.schema import VERSION, RequestTrace, read_trace
from memento_sgl.offline.rollout.record import read_rollouts, write_rollouts
from memento_sgl.rule.config import MementoConfig

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "tests" / "saved"


@pytest.fixture(params=sorted(path.name for path in SAVED.iterdir() if path.is_dir()))
def saved(request: pytest.FixtureRequest) -> Path:
    return SAVED / str(request.param)


def test_launch_options(saved: Path) -> None:
    given = json.loads((saved / "launch.json").read_text())
    config = MementoConfig.parse(str(saved / "launch.json"))
    assert given.items() <= config.model_dump().items()
    assert config.keep_last_n_blocks == 2
    assert config.model_dump(exclude=set(given)) == MementoConfig().model_dump(exclude=set(given))


def test_rollouts(saved: Path, tmp_path: Path) -> None:
    records = list(read_rollouts(saved / "rollouts.jsonl"))
    assert [len(record.evictions) for record in records] == [4, 3, 8, 3, 0]
    assert any(record.permitted and record.forced for record in records)
    write_rollouts(tmp_path / "again.jsonl", records)
    assert list(read_rollouts(tmp_path / "again.jsonl")) == records
    pytest.importorskip("torch")
    for record in records:
        assert len(record.layout().logical) == len(record.tokens)


def test_traces(saved: Path, tmp_path: Path) -> None:
    paths = sorted((saved / "traces").iterdir())
    traces = [read_trace(path) for path in paths]
    assert sum(len(trace.evictions) for trace in traces) > 10
    assert {"think", "void", "answer"} <= {e.kind for trace in traces for e in trace.events}
    timeline = tmp_path / "timeline.json"
    command = ["trace", str(saved / "traces"), "--chrome", str(timeline)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(timeline.read_text())


def test_the_schema_has_the_version_of_the_format(tmp_path: Path) -> None:
    schema = json.loads((ROOT / "docs" / "trace.schema.json").read_text())
    assert schema["version"] == VERSION
    assert schema["properties"]["format"]["const"] == schema["$id"] == f"memento-trace-{VERSION}"
    assert schema == RequestTrace.model_json_schema()
    path = next((SAVED / "0.1.0" / "traces").iterdir())
    later = json.loads(path.read_text()) | {"format": f"memento-trace-{VERSION + 1}"}
    (tmp_path / "later.json").write_text(json.dumps(later))
    with pytest.raises(DataError, match=f"format: Input should be 'memento-trace-{VERSION}'"):
        read_trace(tmp_path / "later.json")
