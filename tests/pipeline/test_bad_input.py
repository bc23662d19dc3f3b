"""What files must not do: end the run, or lose a row without a word."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memento_pipeline.read import rows as read_module
from memento_pipeline.read import shapes as _shapes
from memento_pipeline.read.columns import ROLES, SYSTEM, THOUGHTS, VERDICTS
from memento_pipeline.read.rows import ReadOptions, count_rows, read_traces
from memento_pipeline.read.said import TAGS, RowError
from memento_pipeline.records import Rejected, Trace
from rows import trace
from typer.testing import CliRunner

from memento_sgl.cli import app as cli
from memento_sgl.offline.inputs.rows import Broken, parse_json

GOOD = {"problem": "Q", "cot": "T", "answer": "A"}


def reasons(path: Path) -> list[str | None]:
    """One entry per row: None where it is a trace."""
    rows = read_traces([path])
    return [row.reason if isinstance(row, Rejected) else None for row in rows]


def table(path: Path, columns: dict[str, pa.Array]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def text(*values: bytes) -> pa.Array:
    """A column of text that nobody has checked."""
    return pa.array(values, pa.binary()).cast(pa.binary()).view(pa.string())


NULL_TEXT = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>T</think>A"}]},
    ]
}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (NULL_TEXT, "a text part without text"),
        (GOOD | {"source": "\ud800"}, "lone surrogates"),
        (GOOD | {"domain": "\udfff"}, "lone surrogates"),
        (GOOD | {"id": "\ud800"}, "lone surrogates"),
        (GOOD | {"problem": "\ud800"}, "lone surrogates"),
        (GOOD | {"cot": "a\ud800<think>T</think>A"}, "lone surrogates"),
        (GOOD | {"answer": [1]}, "answer must be text"),
        (GOOD | {"answer": float("inf")}, "answer must be text"),
    ],
)
def test_a_bad_row_is_rejected_and_the_others_are_read(
    tmp_path: Path, row: dict[str, Any], why: str
) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, row, GOOD | {"cot": "U"})))
    first, bad, last = reasons(path)
    assert (first, last) == (None, None)
    assert bad is not None
    assert why in bad


def test_an_endless_integer(tmp_path: Path) -> None:
    long = json.dumps(GOOD)[:-1] + ', "n": ' + "9" * 5000 + "}"
    lines = [json.dumps(GOOD), long, json.dumps(GOOD | {"cot": "U"})]
    (tmp_path / "f.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "f.json").write_text("[" + ",".join(lines) + "]")
    for path in (tmp_path / "f.jsonl", tmp_path / "f.json"):
        first, bad, last = reasons(path)
        assert (first, last) == (None, None)
        assert "4300 digits" in str(bad)


def test_cells_of_tables(tmp_path: Path) -> None:
    """Text that is not UTF-8 and times that Python does not have spoil their row if they matter;
    else the row is kept, with a note."""
    good, bad = pa.array(["T", "U", "V"]), text(b"x", b"\xff\xfe", b"y")
    problem = pa.array(["Q"] * 3)
    rows = reasons(table(tmp_path / "a.parquet", {"problem": problem, "cot": bad}))
    assert [why is None for why in rows] == [True, False, True]
    assert "column 'cot' cannot be read: UnicodeDecodeError" in str(rows[1])
    when = pa.array([0, 2**62, 1], pa.timestamp("ms"))
    columns = {"problem": problem, "cot": good, "when": when, "other": bad}
    kept = list(read_traces([table(tmp_path / "b.parquet", columns)]))
    assert all(isinstance(row, Trace) for row in kept), kept
    noted = [row.provenance.get("unreadable") for row in kept if isinstance(row, Trace)]
    assert noted == [None, ["other", "when"], None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl.gz", "jsonl.zst", "json"])
def test_a_damaged_file_is_named_and_the_others_are_read(
    tmp_path: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    rows = [GOOD | {"cot": f"T{n} " + "word " * 50} for n in range(300)]
    bad = tmp_path / f"b.{suffix}"
    write_as(bad, rows)
    damage(bad)
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps(GOOD | {"cot": "U"}) + "\n")
    found = list(read_traces([tmp_path]))
    count_rows([tmp_path])  # says nothing, does not raise
    assert [row.thought for row in (found[0], found[-1]) if isinstance(row, Trace)] == ["T", "U"]
    refused = [row for row in found if isinstance(row, Rejected)]
    if bad.stat().st_size or suffix in ("parquet", "arrow"):
        assert [Path(row.file).name for row in refused] == [bad.name]
        assert "cut off" in refused[0].reason


def write_as(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        batch = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_table(batch)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        half = lines.index(b"\n", len(lines) // 2) + 1  # two frames, as parallel writers make
        codec = pa.Codec("zstd")
        parts = (codec.compress(part, asbytes=True) for part in (lines[:half], lines[half:]))
        path.write_bytes(b"".join(parts))
    elif path.suffix.lower() == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes(lines)


@pytest.mark.parametrize(
    "name", ["f.jsonl", "f.JSONL", "f.ndjson", "f.jsonl.zst", "f.jsonl.gz", "f.json", "F.Json"]
)
def test_kinds_of_files(tmp_path: Path, name: str) -> None:
    rows = [GOOD | {"cot": f"T{n} é" + "word " * 9} for n in range(2000)]
    write_as(tmp_path / name, rows)
    found = [row.thought for row in read_traces([tmp_path]) if isinstance(row, Trace)]
    assert found == [row["cot"] for row in rows]
    (tmp_path / "g.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows[:9]))
    assert reasons(tmp_path / "g.json") == [None] * 9


def test_a_broken_array_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(f'[{json.dumps(GOOD)}, {{"problem" "Q"}}, {json.dumps(GOOD)}' + " " * 99 + "]")
    first, bad = reasons(path)
    assert first is None
    assert "nothing after it is read" in str(bad)
    path.write_bytes(b'[{"problem": "Q", "cot": "\xff"}, ' + json.dumps(GOOD).encode() + b"]")
    bad, last = reasons(path)
    assert "lone surrogates" in str(bad)
    assert last is None


def test_the_safety_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the reader itself costs a row, or the rest of a file, not the run."""

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("oh")

    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(read_module, "to_traces", breaks)
        assert reasons(path) == ["cannot be read: ZeroDivisionError: oh"]
    with monkeypatch.context() as patch:
        patch.setattr(read_module, "read_values", breaks)
        assert reasons(path) == ["f.jsonl cannot be read: ZeroDivisionError: oh"]
    assert reasons(path) == [None]


KEYS = sorted(
    {name for names in ROLES.values() for name in names}
    | {*THOUGHTS, *SYSTEM, *VERDICTS, "role", "from", "content", "value", "type", "text", "images"}
)
WORDS = st.sampled_from(
    ["Q", "T", "", " ", "on", "user", "assistant", "tool", "thinking", "\ud800", "\0"]
    + [tag for pair in TAGS for tag in pair]
    + ["<|block_start|>x<|block_end|><|summary_start|>m<|summary_end|>"]
    + ["<|channel|>analysis<|message|>", "<|end|>", "<|start|>", "<|channel|>final<|message|>"]
)
TEXTS = st.lists(WORDS, max_size=6).map("".join) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.binary(max_size=4)
    | st.dates()
    | st.decimals()
    | st.just(datetime.datetime.max)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES},
        optional={"reasoning_content": VALUES, "reasoning_details": VALUES, "tool_calls": VALUES},
    ),
    max_size=3,
)
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6) | st.fixed_dictionaries(
    {"problem": TEXTS},
    optional={"cot": TEXTS, "response": TEXTS | TURNS, "answer": VALUES, "difficulty": VALUES},
)


@settings(max_examples=150, deadline=None)
@given(row=ROWS | st.fixed_dictionaries({"messages": TURNS}), choose=st.sampled_from([None, "all"]))
def test_any_row_is_a_trace_or_has_a_reason(row: dict[str, Any], choose: Any) -> None:
    """Not even the safety net is needed; a trace can be stored; no mark is left in its thought."""
    found = []
    with suppress(RowError):
        found = list(_shapes.to_traces(row, {}, {"file": "f", "row": 1}, choose))
    for trace_, content in found:
        assert Trace.model_validate_json(trace_.model_dump_json()) == trace_
        assert len(content) == 64
        assert "<think>" not in trace_.thought or trace_.given_blocks


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.binary(max_size=200),
    kind=st.sampled_from([".jsonl", ".json", ".jsonl.zst", ".parquet"]),
)
def test_any_bytes_end_with_a_reason(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / f"f{kind}"
    path.write_bytes(data)
    for row in read_traces([path], ReadOptions()):
        assert isinstance(row, Trace) or row.reason


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(_JSON, st.booleans(), st.none() | st.tuples(st.integers(0, 99), st.integers(0, 255)))
def test_the_fast_parser_reads_what_pythons_reads(
    value: Any, ascii_only: bool, change: tuple[int, int] | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if change is not None:
        place = change[0] % len(text)
        text = text[:place] + bytes(change[1:]) + text[place + 1 :]
    _same_as_python(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            b'{"a":1,"a":2}',
            b"\xef\xbb\xbf{}",
            b'"\\ud800"',
            b'"\xed\xa0\x80"',
            b'"\\ud83d\\ude00"',
        ),
        *(b"[NaN, Infinity, -Infinity, 1e400, -0, -0.0]", b"[" * 300 + b"]" * 300, b"{} x", b""),
        *(b"1" * 5000, b"1" * 4000, b"01", b"1.", b".5", b"-NaN", b"nan", b'"\x01"', b"\x0c1"),
        *(b"0.1", b"5e-324", b"2.2250738585072011e-308", b"123456789012345678901234567890e-9"),
        json.dumps("ä").encode("utf-16"),
    ],
)
def test_the_fast_parser_knows_the_corners(text: bytes) -> None:
    _same_as_python(text)


def _same_as_python(text: bytes) -> None:
    try:
        expected = repr(json.loads(text))
    except (ValueError, RecursionError):
        assert isinstance(parse_json(text), Broken)
    else:
        assert repr(parse_json(text)) == expected


def test_a_run_goes_on(tmp_path: Path) -> None:
    """Through the command: bad rows and files are listed, the good row comes out."""
    source = tmp_path / "in"
    source.mkdir()
    rows = [trace("good"), NULL_TEXT, trace("bad") | {"source": "\ud800"}]
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "b.parquet").write_bytes(b"PAR1")
    empty = trace("empty") | {"problem": " "}
    (source / "c.jsonl").write_text(json.dumps(empty) + "\n")
    args = ["convert", str(source), "--out", str(tmp_path / "out"), "--min-trace-tokens", "9"]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 4, done.output
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").open()]
    left_out = {(Path(row["file"]).name, row["row"]): row for row in rejected}
    assert left_out.keys() == {("a.jsonl", 2), ("a.jsonl", 3), ("b.parquet", 1), ("c.jsonl", 1)}
    assert "b.parquet cannot be read" in left_out["b.parquet", 1]["reason"]
    assert left_out["c.jsonl", 1]["reason"] == "empty problem"
    assert len((tmp_path / "out/default/train.jsonl").read_text().splitlines()) == 1
