"""Reading: every shape, nothing dropped without a word, ids that stay."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memento_pipeline.read.rows import ReadOptions, count_rows, read_traces, why_filtered
from memento_pipeline.records import Rejected, Trace
from memento_pipeline.text.tokens import ApproxCounter

from memento_sgl.errors import ConfigError

COUNTER = ApproxCounter()


def write(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[Trace | Rejected]:
    return list(read_traces([path], ReadOptions(**options)))


def one(tmp_path: Path, row: Mapping[str, Any], **options: Any) -> Trace:
    (found,) = read(write(tmp_path / "one.jsonl", [row]), **options)
    assert isinstance(found, Trace), found
    return found


def refused(tmp_path: Path, row: Mapping[str, Any] | str, **options: Any) -> str:
    (found,) = read(write(tmp_path / "one.jsonl", [row]), **options)
    assert isinstance(found, Rejected), found
    return found.reason


THOUGHT = "\n\tOne  thing.\n\nAnother\\\\[2pt] thing. \n"


@pytest.mark.parametrize("problem", ["problem", "prompt", "question"])
@pytest.mark.parametrize("column", ["cot", "full_cot", "response"])
def test_columns(tmp_path: Path, problem: str, column: str) -> None:
    row = {problem: "Why?", column: f"<think>{THOUGHT}</think>\nSo.", "source": "s"}
    trace = one(tmp_path, row | {"domain": "math", "difficulty": 3.0})
    assert (trace.problem, trace.thought, trace.answer) == ("Why?", THOUGHT, "\nSo.")
    assert (trace.source, trace.domain, trace.difficulty) == ("s", "math", 3)
    assert trace.closed
    assert trace.provenance["row"] == 1


@pytest.mark.parametrize(
    "turns",
    [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "{}"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "{}"}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": "A", "reasoning_content": THOUGHT},
            ]
        },
    ],
)
def test_turns(tmp_path: Path, turns: dict[str, list[dict[str, Any]]]) -> None:
    text = json.dumps(turns).replace('"{}"', json.dumps(f"<think>{THOUGHT}</think>A"))
    trace = one(tmp_path, json.loads(text))
    assert (trace.problem, trace.thought, trace.answer) == ("Q", THOUGHT, "A")
    system = [turn["content"] for turn in turns.get("messages", ()) if turn["role"] == "system"]
    assert trace.provenance.get("system") == (system[0] if system else None)


@pytest.mark.parametrize("column", ["cot", "response"])
def test_closing_tag_without_opening_tag(tmp_path: Path, column: str) -> None:
    """The opening tag was part of the prompt: thought and answer are still apart."""
    trace = one(tmp_path, {"problem": "p", column: f"{THOUGHT}</think>\n\nA <think> x"})
    assert (trace.thought, trace.answer, trace.closed) == (THOUGHT, "\n\nA <think> x", True)


def test_open_ends(tmp_path: Path) -> None:
    """A thought that was cut off is open; a plain response is no thought at all."""
    assert not one(tmp_path, {"problem": "p", "cot": f"<think>{THOUGHT}"}).closed
    bare = one(tmp_path, {"problem": "p", "cot": THOUGHT, "answer": "A"})
    assert (bare.thought, bare.answer, bare.closed) == (THOUGHT, "A", True)
    plain = one(tmp_path, {"problem": "p", "response": "Only an answer."})
    assert (plain.thought, plain.closed) == ("", False)
    named = one(tmp_path, {"q": "p", "r": THOUGHT}, columns={"problem": "q", "thought": "r"})
    assert (named.problem, named.thought) == ("p", THOUGHT)
    early = one(tmp_path, {"problem": "p", "cot": "Hm. <think>T</think>A"})
    assert (early.thought, early.provenance["before_think"]) == ("T", "Hm. ")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "x"}, "no known columns among"),
        ({"problem": "p"}, "no known columns"),
        ({"problem": 3, "cot": "c"}, "must be text"),
        ({"problem": "p", "cot": ["c"]}, "must be text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "0 assistant turns"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "2 user turns"),
        ({"messages": "hello"}, "list of objects"),
        ({"problem": "p", "cot": "\ud800"}, "surrogates"),
        ("[1, 2]", "expected an object, got list"),
        ('{"problem": "p", "cot', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_rows_keep_their_reason(tmp_path: Path, row: Mapping[str, Any] | str, why: str) -> None:
    assert why in refused(tmp_path, row)


def test_bad_rows_do_not_stop_the_others(tmp_path: Path) -> None:
    good = {"problem": "p", "cot": "c"}
    path = write(tmp_path / "f.jsonl", [good | {"id": 1}, "{broken", "", good | {"id": 2}])
    found = read(path)
    assert [row.id for row in found if isinstance(row, Trace)] == ["1", "2"]
    (bad,) = [row for row in found if isinstance(row, Rejected)]
    assert (bad.row, bad.excerpt) == (2, "{broken\n")
    with path.open("ab") as file:
        file.write(b'{"problem": "p", "cot": "\xff')
    assert "not UTF-8" in read(path)[-1].reason


def test_a_torn_last_line_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"problem": "p", "cot": "c"}])
    path.write_text(path.read_text() + '{"problem": "p", "c')
    assert "torn off" in read(path)[-1].reason


def test_ids(tmp_path: Path) -> None:
    row = {"problem": "p", "cot": "c"}
    same = write(
        tmp_path / "f.jsonl",
        [row, row, row | {"id": "x"}, row | {"id": "x"}, {"id": "x", "problem": "q", "cot": "d"}],
    )
    first, again, named, twin, other = read(same)
    assert len(first.id or "") == 16
    assert read(same)[0] == first
    assert isinstance(again, Rejected)
    assert again.reason == "duplicate of f.jsonl:1"
    assert (named.id, twin.reason) == ("x", "duplicate of f.jsonl:3")
    assert isinstance(other, Trace)
    assert other.id.startswith("x~")
    assert one(tmp_path, row | {"key": 7}, columns={"id": "key"}).id == "7"


def test_files_and_folders(tmp_path: Path) -> None:
    rows = [{"id": str(number), "problem": "p", "cot": f"c{number}"} for number in range(6)]
    folder = tmp_path / "data"
    (folder / ".hidden").mkdir(parents=True)
    write(folder / ".hidden/no.jsonl", rows)
    write(folder / "a.jsonl", rows[:2])
    pq.write_table(pa.Table.from_pylist(rows[2:4]), folder / "b.parquet")
    with pa.OSFile(str(folder / "c.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(rows[4:5])
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[5]).encode() + b"\n"))
    (folder / "dataset_info.json").write_text("{}")
    found = read(folder)
    assert [row.id for row in found] == ["0", "1", "2", "3", "4", "5"]
    assert count_rows([folder]) is None
    assert count_rows([folder / "a.jsonl", folder / "b.parquet", folder / "c.arrow"]) == 5


def test_unreadable_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "missing.jsonl")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ConfigError, match="known kinds"):
        read(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        read(tmp_path / "empty")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    assert "x.parquet cannot be read after row 0" in read(tmp_path / "x.parquet")[-1].reason
    with pytest.raises(ConfigError, match="unknown column roles"):
        read(write(tmp_path / "a.jsonl", []), columns={"cot": "x"})
    (tmp_path / "t.jsonl.gz").write_bytes(
        gzip.compress(b'{"problem": "p", "cot": "c"}\n' * 99)[:40]
    )
    assert "cut off or damaged" in read(tmp_path / "t.jsonl.gz")[-1].reason


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({}, {}, None),
        ({"closed": False}, {}, "no </think>"),
        ({"closed": False}, {"require_closed": False}, None),
        ({"thought": " \n"}, {}, "empty thought"),
        ({"thought": "short."}, {}, "too short: 2 of at least 200 tokens"),
        ({}, {"max_tokens": 300}, "too long: 400 of at most 300 tokens"),
        ({"thought": "数" * 300}, {}, None),
        ({"thought": "数" * 300}, {"drop_cjk": True}, "CJK characters"),
    ],
)
def test_filters(changes: dict[str, Any], options: dict[str, Any], why: str | None) -> None:
    trace = Trace(id="t", problem="p", thought="word " * 200 + "1 " * 99 + "1")
    trace = trace.model_copy(update=changes)
    assert why_filtered(trace, ReadOptions(**options), COUNTER) == why


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Peak memory while reading 8 times as many rows stays what it was."""

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for number in range(rows):
                file.write(json.dumps({"problem": f"p{number}", "cot": "word " * 2000}) + "\n")
        tracemalloc.start()
        assert sum(1 for _ in read_traces([path])) == rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(1600) < 1.5 * peak(200)
