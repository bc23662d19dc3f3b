"""The tables of input forms in docs/pipeline-formats.md: every line is read as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memento_pipeline.read.columns import ROLES
from memento_pipeline.read.rows import ReadOptions, read_traces
from memento_pipeline.records import Rejected, Trace

PAGE = Path(__file__).parents[2] / "docs" / "pipeline-formats.md"
CELL = re.compile(r"(?<!\\)\|")


def table(first: str) -> list[list[str]]:
    """Cells of the table that has this header line."""
    lines = PAGE.read_text(encoding="utf-8").partition(f"{first}\n")[2].splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    cells = [CELL.split(line.strip().strip("|")) for line in lines[:end]]
    return [[cell.strip().strip("`").replace("\\|", "|") for cell in row] for row in cells]


FORMS = [pytest.param(json.loads(row), id=form) for form, row in table("| form | row |")]
ERRORS = [pytest.param(json.loads(row), why, id=why) for row, why in table("| row | reason |")]


def read(path: Path, row: dict[str, Any], **options: Any) -> list[Trace | Rejected]:
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return list(read_traces([path], ReadOptions(**options)))


def one(path: Path, row: dict[str, Any], **options: Any) -> Trace:
    (found,) = read(path, row, **options)
    assert isinstance(found, Trace), found
    return found


def says(trace: Trace) -> tuple[str, str, str]:
    return trace.problem.strip(), trace.thought.strip(), trace.answer.strip()


@pytest.mark.parametrize("row", FORMS)
def test_form(tmp_path: Path, row: dict[str, Any]) -> None:
    trace = one(tmp_path / "one.jsonl", row)
    assert says(trace) == ("Q", "T", "A")
    assert trace.closed


@pytest.mark.parametrize("row", FORMS)
def test_form_in_parquet(tmp_path: Path, row: dict[str, Any]) -> None:
    """Arrow gives all structs of a column the same fields, null where a row has none."""
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "one.parquet")
    (trace,) = read_traces([tmp_path / "one.parquet"])
    assert isinstance(trace, Trace), trace
    assert says(trace) == ("Q", "T", "A")


@pytest.mark.parametrize(("row", "why"), ERRORS)
def test_error(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    (found,) = read(tmp_path / "one.jsonl", row)
    assert isinstance(found, Rejected), found
    assert why in found.reason


def test_roles_of_the_page() -> None:
    """The page names the columns that the code looks for, in that order."""
    said = {role: re.split(r"[,;:] ", rest) for role, rest in table("| role | columns |")}
    assert said.keys() == ROLES.keys()
    for role, names in said.items():
        assert [name for name in names if " " not in name] == list(ROLES[role]), role


@pytest.mark.parametrize(
    ("answer", "text"),
    [(42, "42"), (0.5, "0.5"), (-3, "-3"), (10**400, str(10**400)), ("", ""), (float("nan"), "")],
)
def test_answers(tmp_path: Path, answer: Any, text: str) -> None:
    trace = one(tmp_path / "a.jsonl", {"problem": "Q", "cot": "T", "answer": answer})
    assert trace.answer == text
    assert trace.provenance.get("no_answer", False) == (not text)


@pytest.mark.parametrize("given", [6.5, "7", "hard", True, 10**20, 10**400, float("inf"), [1]])
def test_difficulty_is_never_worth_a_row(tmp_path: Path, given: Any) -> None:
    row = {"problem": "Q", "cot": "T", "answer": "A", "difficulty": given}
    trace = one(tmp_path / "a.jsonl", row)
    assert trace.difficulty is None
    assert "no whole number" in trace.provenance["difficulty"]


def test_choosing_generations(tmp_path: Path) -> None:
    row = {
        "id": "x",
        "problem": "Q",
        "generations": ["<think>T</think>A", "<think>U</think>B", "<think>V</think>C"],
        "correctness_math_verify": [False, False, False],
        "correctness_llama": [None, True, None],
    }
    path = tmp_path / "g.jsonl"
    assert says(one(path, row)) == ("Q", "U", "B")
    assert says(one(path, row, generations="first")) == ("Q", "T", "A")
    every = read(path, row, generations="all")
    assert [trace.id for trace in every] == ["x#1", "x#2", "x#3"]
    (bad,) = read(path, {"problem": "Q", "generations": ["T</think>A"]}, generations="verified")
    assert isinstance(bad, Rejected)
    assert "--generations" in bad.reason
    row["generations"][1] = "<think>T</think>A<think>U</think>B"  # type: ignore[index]
    *good, bad = read(path, row, generations="all")
    assert [trace.id for trace in good] == ["x#1", "x#3"]
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith("generation 2: several thoughts")


def test_named_columns_win(tmp_path: Path) -> None:
    row = {
        "question": "Q",
        "deepseek_thinking_trajectory": "x",
        "deepseek_attempt": "y",
        "gemini_thinking_trajectory": "T",
        "gemini_attempt": "A",
        "short": 7,
    }
    columns = {"thought": "gemini_thinking_trajectory"}
    path = tmp_path / "s.jsonl"
    assert says(one(path, row, columns=columns)) == ("Q", "T", "A")
    assert says(one(path, row, columns=columns | {"answer": "short"})) == ("Q", "T", "7")
    (bad,) = read(path, row, columns={"thought": "cot"})
    assert isinstance(bad, Rejected)
    assert "--column" in bad.reason


def test_notes(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": "Two."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "Well. <think>T</think>A"},
    ]
    trace = one(tmp_path / "n.jsonl", {"messages": turns, "tools": [{"type": "function"}]})
    assert trace.provenance["system"] == "One.\n\nTwo."
    assert trace.provenance["before_think"] == "Well. "
    assert trace.provenance["tools"] == 1
