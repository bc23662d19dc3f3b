"""Whatever the endpoint does, the rows are those of a faultless run, and nothing is paid twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_server import ALL_FAULTS, CONTENT_FAULTS, HARMLESS, FaultServer, spread
from memento_pipeline.run.convert import Exit
from memento_pipeline.run.runner import MOST_FAILED_IN_A_ROW
from memento_pipeline.stages.score import ScoreOptions
from memento_pipeline.stages.summarize import SummarizeOptions
from scenes import FAST, options, result_of, run, serving, write_traces

TRACES = 40
PATIENT = {
    "score": ScoreOptions(tries=12),
    "summarize": SummarizeOptions(tries=12, gate_mean=0, gate_least=0),
}


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    """The input and what a run without any fault makes of it."""
    folder = tmp_path_factory.mktemp("faultless")
    traces = write_traces(folder / "traces.jsonl", TRACES)
    with serving() as server:
        outcome = run(options(folder / "out", traces, server.url, **PATIENT))
    assert outcome.counts == {"ok": TRACES, "rejected": 0}
    assert set(server.calls) == {"all", "score", "summarize", "review", "judge"}
    rows = result_of(folder / "out")
    scores = {attempt["judge_score"] for row in rows for attempt in histories(row)}
    assert scores == {10.0, 7.0}  # some passed, some did not
    mementos = [memento for row in rows for memento in row["mementos"]]  # type: ignore[attr-defined]
    assert any(len(memento["history"]) == 2 for memento in mementos)
    assert any("failed" in memento["text"] and memento["passed"] for memento in mementos)
    return traces, rows


def histories(row: dict[str, object]) -> list[dict[str, object]]:
    return [attempt for memento in row["mementos"] for attempt in memento["history"]]  # type: ignore[attr-defined]


def check(server: FaultServer, out: Path, rows: list[dict[str, object]]) -> None:
    assert result_of(out) == rows
    assert max(server.by_key.values()) == 1, "an answer was paid twice"


@pytest.mark.parametrize(("rate", "seed"), [(0.01, 2), (0.1, 2), (0.3, 3), (0.3, 4)])
def test_rows_do_not_depend_on_faults(
    faultless: tuple[Path, list[dict[str, object]]], tmp_path: Path, rate: float, seed: int
) -> None:
    traces, rows = faultless
    with serving(faults=spread(rate), seed=seed, hang=10.0) as server:
        outcome = run(options(tmp_path, traces, server.url, **PATIENT))
    assert outcome.exit is Exit.OK
    # Faults are drawn by seed, request and try: a slow machine can only add tries.
    assert server.struck.total() >= rate * len(server.asked) > 1
    check(server, tmp_path, rows)


@pytest.mark.parametrize("kind", [*CONTENT_FAULTS, *HARMLESS])
def test_every_kind_of_odd_answer(
    faultless: tuple[Path, list[dict[str, object]]], tmp_path: Path, kind: str
) -> None:
    traces, rows = faultless
    with serving(faults={kind: 0.4}, seed=5) as server:
        outcome = run(options(tmp_path, traces, server.url, **PATIENT, limit=3))
    assert outcome.counts["ok"] == 3
    assert server.struck[kind] > 0
    if kind in HARMLESS:
        assert sum(server.answered.values()) == len(server.answered), "it was asked again"
    check(server, tmp_path, rows[:3])


def test_an_endpoint_without_schemas_and_usage(
    faultless: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    traces, rows = faultless
    with serving(schema=False, usage=False) as server:
        outcome = run(options(tmp_path, traces, server.url, **PATIENT))
    check(server, tmp_path, rows)
    assert outcome.spent.unknown == outcome.spent.answers > 0


def test_a_useless_llm_fails_traces_and_makes_nothing_up(
    faultless: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    traces, rows = faultless
    useless = {"score": ScoreOptions(tries=2), "summarize": PATIENT["summarize"]}
    with serving(faults={"empty": 1.0}) as server:
        outcome = run(options(tmp_path, traces, server.url, **useless))
        assert outcome.exit is Exit.STOPPED  # not after all traces have paid for nothing
        assert f"{MOST_FAILED_IN_A_ROW} traces failed in a row" in str(outcome.summary.stopped)
        failed = outcome.counts["failed"]
        assert MOST_FAILED_IN_A_ROW <= failed < TRACES
        assert all(row["scores"] is None for row in result_of(tmp_path))
        assert "no usable answer in 2 tries" in next(iter(outcome.summary.reasons))
        server.settings.faults = {}
        again = run(options(tmp_path, traces, server.url, **useless))
        assert again.exit is Exit.FAILED
        assert again.summary.seen["finished"] == failed  # not repaired unasked
        repaired = run(options(tmp_path, traces, server.url, **useless), retry_failed=True)
    assert repaired.exit is Exit.OK
    check(server, tmp_path, rows)


def test_a_judge_outage_fails_and_leaks_nothing(
    faultless: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    traces, rows = faultless
    refuse = "Task: grade these"
    ask = FAST.model_copy(update={"retries": 1})
    with serving(refuse=refuse) as server:
        server.keep_prompts = True
        outcome = run(options(tmp_path, traces, server.url, **PATIENT, ask=ask))
        assert outcome.counts["failed"] == TRACES
        assert not any("refused" in user or "127.0.0.1" in user for user in server.users)
        server.settings.refuse = ""
        run(options(tmp_path, traces, server.url, **PATIENT, ask=ask), retry_failed=True)
    check(server, tmp_path, rows)


def test_a_wrong_key_costs_one_call_and_is_repaired_by_resuming(
    faultless: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    traces, rows = faultless
    with serving(key="right") as server:
        outcome = run(options(tmp_path, traces, server.url, **PATIENT))
        assert server.calls["all"] == 1
        assert outcome.exit is Exit.STOPPED
        assert "MEMENTO_API_KEY" in str(outcome.summary.stopped)
        assert set(outcome.counts) == {"unfinished", "rejected"}
        assert result_of(tmp_path) == []
        server.settings.key = None
        assert run(options(tmp_path, traces, server.url, **PATIENT)).exit is Exit.OK
    check(server, tmp_path, rows)


def test_all_faults_are_known() -> None:
    assert len(set(ALL_FAULTS)) == len(ALL_FAULTS) > 25
