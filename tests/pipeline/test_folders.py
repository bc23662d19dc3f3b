"""Which files of a folder are input: one split, and never what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memento_pipeline.read.files import list_files
from memento_pipeline.read.splits import split_of
from memento_pipeline.store.folder import Store
from rows import trace
from typer.testing import CliRunner, Result

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError


def put(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(trace(name)) + "\n")
    return folder


def listed(folder: Path, **options: object) -> list[str]:
    return [str(file.relative_to(folder)) for file in list_files([folder], **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00002-0123456789abcdef.parquet", "test"),
        ("data/cot-00000-of-00144.parquet", "cot"),
        ("math_train-00000-of-00002.parquet", "train"),
        ("validation/data-00000-of-00001.arrow", "validation"),
        ("gsm8k_dev.jsonl.gz", "validation"),
        ("my-eval.json", "test"),
        ("test/train.jsonl", "train"),
        ("data-00000-of-00001.arrow", None),
        ("traces.jsonl", None),
        ("contest.jsonl", None),
        ("trainer/a.jsonl", None),
    ],
)
def test_split_of_a_file(file: str, split: str | None) -> None:
    assert split_of(Path(file)) == split


def test_one_split_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = put(tmp_path / "hub", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
    put(hub, "more.jsonl")
    caplog.set_level("INFO", "memento_pipeline")
    assert listed(hub) == ["data/train-00000-of-00001.jsonl", "more.jsonl"]
    (record,) = caplog.records
    assert (record.split, record.left_out) == ("train", ["test"])  # type: ignore[attr-defined]
    assert listed(hub, split="test") == ["data/test-00000-of-00001.jsonl"]
    assert len(listed(hub, split="all")) == 3
    with pytest.raises(ConfigError, match=r"no split 'dev' but test, train.*--split"):
        list_files([hub], split="dev")
    many = put(tmp_path / "many", "cot-00000-of-00001.jsonl", "tir-00000-of-00001.jsonl")
    with pytest.raises(ConfigError, match="no split 'train' but cot, tir"):
        list_files([many])
    assert len(listed(put(tmp_path / "one", "test.jsonl"))) == 1
    assert list_files([hub / "data/test-00000-of-00001.jsonl"])  # a file that is named is read


def test_metadata_is_no_input(tmp_path: Path) -> None:
    put(tmp_path, "a.json", "dataset_info.json", "state.json", "cache-1/b.jsonl", ".x.jsonl")
    assert listed(tmp_path) == ["a.json"]


def convert(*arguments: object) -> Result:
    limits = ("--min-trace-tokens", "20", "--min-block-tokens", "60")
    return CliRunner().invoke(app, ["convert", *map(str, arguments), *limits])


def ids(out: Path) -> list[str]:
    with Store(out, create=False) as store:
        return [one.id for one in store.traces()]


@pytest.mark.parametrize("out", ["in/work", "in"])
def test_the_output_is_no_input(tmp_path: Path, out: str) -> None:
    """Also on the second run, when it is there, and where the input folder is the output folder."""
    source, target = put(tmp_path / "in", "a.jsonl"), tmp_path / out
    for _ in range(2):
        done = convert(source, "--out", target)
        assert done.exit_code == 0, done.output
        assert "output of runs is no input" in (target / "log.jsonl").read_text()
        assert ids(target) == ["a.jsonl"]
        assert len((target / "default/train.jsonl").read_text().splitlines()) == 1


def test_work_folders_as_input(tmp_path: Path) -> None:
    """One table is read of a work folder that is named; one that lies in a folder is left out."""
    source = put(tmp_path / "in", "a.jsonl")
    convert(source, "--out", source / "old")
    assert list_files([source / "old"]) == [source / "old/default/train.jsonl"]
    again = convert(source / "old", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert len(ids(tmp_path / "again")) == 1
    assert convert(source, "--out", tmp_path / "new").exit_code == 0
    assert ids(tmp_path / "new") == ["a.jsonl"]
    (source / "old/default/train.jsonl").unlink()
    with pytest.raises(ConfigError, match="finish its run"):
        list_files([source / "old"])


def edit(file: Path, **changes: str) -> None:
    row = json.loads(file.read_text().splitlines()[0]) | changes
    file.write_text(json.dumps(row) + "\n")


def test_an_edited_row_replaces_the_old_one(tmp_path: Path) -> None:
    source, out = put(tmp_path / "in", "a.jsonl"), tmp_path / "work"
    convert(source, "--out", out)
    edit(source / "a.jsonl", problem="Another problem.")
    done = convert(source, "--out", out)
    assert done.exit_code == 0, done.output
    assert "1 x edited since an earlier run" in done.output
    (row,) = (json.loads(line) for line in (out / "default/train.jsonl").open())
    (extras,) = (json.loads(line) for line in (out / "extras/train.jsonl").open())
    assert (row["problem"], extras["id"]) == ("Another problem.", "a.jsonl")
    assert json.loads(extras["provenance"])["edited"]
    assert "1 x edited" not in convert(source, "--out", out).output  # once


def test_merging_again_takes_the_edited_row(tmp_path: Path) -> None:
    source, shard, out = put(tmp_path / "in", "a.jsonl"), tmp_path / "shard", tmp_path / "all"
    for problem in ("Solve a.jsonl.", "Another problem."):
        edit(source / "a.jsonl", problem=problem)
        convert(source, "--out", shard)
        done = CliRunner().invoke(app, ["merge", str(shard), "--out", str(out)])
        assert done.exit_code == 0, done.output
        (row,) = (json.loads(line) for line in (out / "default/train.jsonl").open())
        assert row["problem"] == problem


def test_the_same_id_in_another_file_is_another_trace(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a", "x.jsonl"), put(tmp_path / "b", "x.jsonl")
    edit(second / "x.jsonl", problem="Another problem.")
    for source in (first, second, second, first):
        convert(source, "--out", tmp_path / "work")
        assert ids(tmp_path / "work")[0] == "x.jsonl"
    assert len(ids(tmp_path / "work")) == 2


def test_order_does_not_make_new_traces(tmp_path: Path) -> None:
    """Two rows with one id are told apart by their content, wherever they stand."""
    rows = [trace("x") | {"problem": problem} for problem in ("One.", "Two.")]
    file, out = tmp_path / "in.jsonl", tmp_path / "work"
    for order in (rows, rows[::-1]):
        file.write_text("".join(json.dumps(row) + "\n" for row in order))
        done = convert(file, "--out", out)
        assert " x edited" not in done.output
        assert len(ids(out)) == 2


def test_a_repaired_row_is_no_longer_rejected(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "work"
    file.write_text(json.dumps(trace("x") | {"source": "\ud800"}) + "\n")
    assert convert(file, "--out", out).exit_code == 4
    file.write_text(json.dumps(trace("x")) + "\n")
    assert convert(file, "--out", out).exit_code == 0
    assert (out / "rejected.jsonl").read_text() == ""
