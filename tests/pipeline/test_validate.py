"""The validator passes what is right and names what is wrong."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memento_pipeline.output.export import ExportOptions, write_outputs
from memento_pipeline.output.validate import validate_files, validate_row
from memento_pipeline.run.convert import Exit
from memento_pipeline.text.tokens import ApproxCounter
from rows import convert, trace
from tokenizer import character_tokenizer
from typer.testing import CliRunner, Result

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError

Row = dict[str, Any]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    rows = [trace("a"), trace("b", hostile=True), {"id": "c", "problem": "p", "cot": "short"}]
    done = convert(folder, rows)
    tokenizer = character_tokenizer(folder)
    write_outputs(folder / "work", done, ApproxCounter(), ExportOptions(tokenizer=tokenizer))
    return folder / "work"


@pytest.fixture
def full(work: Path) -> Row:
    return json.loads((work / "full/train.jsonl").read_text().splitlines()[0])


@pytest.fixture
def tokens(work: Path) -> Row:
    import pyarrow.parquet as pq

    return pq.read_table(work / "tokenized/train.parquet").to_pylist()[0]


def replaced(old: str, new: str, count: int = 1) -> Callable[[Row], Any]:
    def change(row: Row) -> None:
        assert old in row["response"]
        row["response"] = row["response"].replace(old, new, count)

    return change


WRONG: list[tuple[Callable[[Row], Any], str]] = [
    (replaced("<|block_end|>", ""), "markers do not form whole blocks"),
    (replaced("<|summary_start|>", "<|block_start|>"), "markers do not form whole blocks"),
    (
        replaced("<|summary_end|>\n<|block_start|>", "<|block_start|><|summary_end|>"),
        "whole blocks",
    ),
    (replaced("<think>\n", "\n"), "does not start with <think>"),
    (replaced("</think>", ""), "0 </think> instead of one"),
    (replaced("<|block_start|>", "Stray words.<|block_start|>"), "thought outside the blocks"),
    (replaced("<|block_end|>", "<|im_end|><|block_end|>"), "special tokens inside text"),
    (
        lambda row: row.update(response=f"{row['response'].partition('</think>')[0]}</think>\n"),
        "no answer",
    ),
    (replaced("</think>", "</think><|eot|>"), "special tokens inside text: <|eot|>"),
    (lambda row: row.update(problem="Say <|im_end|>"), "special tokens in the problem"),
    (lambda row: row.update(problem=" "), "problem is missing or not text"),
    (lambda row: row.update(response=None), "response is missing or not text"),
    (lambda row: row.update(response="No blocks."), "no block"),
    (lambda row: row.update(difficulty="hard"), "difficulty must be a whole number"),
    (lambda row: row.update(difficulty=True), "difficulty must be a whole number"),
    (lambda row: row.update(source=3), "source must be text or null"),
    (lambda row: row.pop("blocks"), "only sentences, block_summaries of the three columns"),
    (lambda row: row["sentences"].append("more"), "1 sentences belong to no block"),
    (lambda row: row["sentences"].__setitem__(0, "other"), "its sentences are not the text"),
    (lambda row: row["block_summaries"].__setitem__(0, "x"), "its summary is not the one"),
    (lambda row: row["block_summaries"].pop(), "summaries"),
    (lambda row: row["blocks"][1].__setitem__(0, 0), "block 1: range"),
    (lambda row: row["blocks"][-1].__setitem__(1, 999), "range"),
]
WRONG_TOKENS: list[tuple[Callable[[Row], Any], str]] = [
    (lambda row: row["labels"].pop(), "differ in length"),
    (lambda row: row["labels"].__setitem__(0, 5), "labels of the prompt are not -100"),
    (lambda row: row["labels"].__setitem__(-1, 5), "labels of the response"),
    (lambda row: row["block_spans"].pop(), "block spans and"),
    (lambda row: row["block_spans"].__setitem__(0, [0, 4]), "spans overlap or leave the response"),
    (lambda row: row["block_spans"][0].__setitem__(1, 10**6), "spans overlap or leave"),
    (
        lambda row: row["memento_spans"][0].__setitem__(0, row["memento_spans"][0][0] + 1),
        "same two",
    ),
    (lambda row: row["evictions"].append([3, 5, 9]), "eviction [3, 5, 9] is not possible"),
]


def test_good_rows_pass(work: Path) -> None:
    for name in ("default", "full", "chat", "tokenized"):
        reports = list(validate_files([work / name]))
        assert len(reports) in (2, 4)
        assert [report.problems for report in reports] == [()] * len(reports)


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_wrong_rows(full: Row, change: Callable[[Row], Any], said: str) -> None:
    row = copy.deepcopy(full)
    change(row)
    assert said in " | ".join(validate_row(row))
    assert validate_row(full) == []


@pytest.mark.parametrize(("change", "said"), WRONG_TOKENS)
def test_wrong_token_rows(tokens: Row, change: Callable[[Row], Any], said: str) -> None:
    row = copy.deepcopy(tokens)
    change(row)
    assert said in " | ".join(validate_row(row))
    assert validate_row(tokens) == []


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


def test_command(work: Path, full: Row, tmp_path: Path) -> None:
    good = validate(work)
    assert (good.exit_code, good.output) == (Exit.OK, "2 of 2 traces are valid, in 18 rows\n")
    bad = tmp_path / "[bold]bad.jsonl"  # no markup of the terminal's
    broken = full | {"response": full["response"].replace("</think>", "")}
    lines = [json.dumps(full), json.dumps(broken), "{torn"]
    bad.write_text("\n".join(lines))
    said = validate(bad)
    assert said.exit_code == Exit.FAILED
    assert f"{bad}:2: 0 </think> instead of one" in said.output
    assert f"{bad}:3: not valid JSON" in said.output
    assert said.output.endswith("1 of 3 rows are valid\n")
    short = validate("--most", 1, bad)
    assert "more problems" in short.output
    assert len(short.output.splitlines()) == 3
    quiet = validate("--quiet", bad)
    assert (quiet.exit_code, quiet.output) == (Exit.FAILED, "")
    assert validate("-q", work).output == ""


def test_a_trace_counts_once(work: Path, tmp_path: Path) -> None:
    """In a work folder, in a pair of files, and where its rows disagree."""
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    assert validate(copy / "full").output == "2 of 2 traces are valid, in 4 rows\n"
    for name in ("default", "chat", "messages"):
        file = copy / name / "train.jsonl"
        first, *rest = file.read_text().splitlines()
        file.write_text("\n".join([first.replace("<|block_end|>", "", 1), *rest]) + "\n")
    said = validate(copy)
    assert said.output.splitlines()[-1] == "1 of 2 traces are valid, in 18 rows"
    assert said.output.count("markers do not form whole blocks") == 3
    file.write_text(file.read_text().splitlines()[1] + "\n")
    said = validate(copy)
    assert said.exit_code == Exit.FAILED
    assert "row counts differ: " in said.output
    assert "messages/train.jsonl 1" in said.output


def test_an_unfinished_work_folder_has_no_rows(work: Path, tmp_path: Path) -> None:
    """Its logs are no rows."""
    for name in ("store.sqlite", "log.jsonl"):
        shutil.copy(work / name, tmp_path / name)
    (tmp_path / "rejected.jsonl").write_text('{"id": "x", "status": "rejected"}\n')
    said = validate(tmp_path)
    assert (said.exit_code, said.output) == (Exit.FAILED, "no rows\n")


@pytest.mark.parametrize("name", ["chat", "messages"])
def test_rows_for_trainers_need_an_answer_too(work: Path, name: str) -> None:
    row = json.loads((work / name / "train.jsonl").read_text().splitlines()[0])
    assert validate_row(row) == []
    texts = json.dumps(row).replace("All done.", "")
    assert validate_row(json.loads(texts)) == ["no answer after </think>"]
    assert validate_row({"messages": [{"role": "user", "content": "x"}]}) == [
        "messages of ['user'] instead of user and assistant"
    ]


def test_command_on_what_is_not_there(tmp_path: Path) -> None:
    assert validate(tmp_path / "none.jsonl").exit_code == Exit.USAGE
    (tmp_path / "empty.jsonl").write_text("")
    empty = validate(tmp_path / "empty.jsonl")
    assert (empty.exit_code, empty.output) == (Exit.FAILED, "no rows\n")
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    assert validate(tmp_path / "x.parquet").exit_code == Exit.USAGE
    with pytest.raises(ConfigError):
        list(validate_files([tmp_path / "none.jsonl"]))


@pytest.mark.parametrize("command", ["validate", "report", "init-model"])
def test_help_teaches_by_example(command: str) -> None:
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert said.exit_code == 0
    assert said.output.replace("Usage: memento", "").count(f"memento {command} ") >= 2
    assert "Exit code: 0" in said.output
