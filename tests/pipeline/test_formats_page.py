"""The example and the tables of docs/pipeline-formats.md are what the program writes."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from memento_pipeline.output.export import ExportOptions
from memento_pipeline.run.convert import Exit
from memento_pipeline.run.stages import RESULTS
from tokenizer import character_tokenizer
from typer.testing import CliRunner

from memento_sgl.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs/pipeline-formats.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: json.loads(text) for name, text in re.findall(r"```json (\w+)\n(.*?)\n```", PAGE, re.S)
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "apples.jsonl").write_text(json.dumps(EXAMPLES["input"]) + "\n")
    (command,) = re.findall(r"^    memento (convert .*)$", PAGE, re.M)
    tokenizer = character_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = [*command.split(), "--train-tokenizer", str(tokenizer)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == Exit.OK, done.output
    return folder / "work"


def rows(work: Path, name: str) -> dict[str, Any]:
    (row,) = pq.read_table(work / name / "train.parquet").to_pylist()
    return row


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(title: str) -> set[str]:
    cells = re.findall(r"^\| (`.*?) \|", section(title), re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_example_rows(work: Path) -> None:
    assert set(EXAMPLES) == {"input", "default", "full", "extras", "chat", "tokenized"}
    for name in ("default", "extras"):
        assert rows(work, name) == EXAMPLES[name], name
        line = json.loads((work / name / "train.jsonl").read_text())
        assert line == EXAMPLES[name], name
    assert rows(work, "full") == EXAMPLES["default"] | EXAMPLES["full"]
    assert json.loads((work / "chat/train.jsonl").read_text()) == EXAMPLES["chat"]
    tokenized = rows(work, "tokenized")
    assert {name: tokenized[name] for name in EXAMPLES["tokenized"]} == EXAMPLES["tokenized"]


def test_tables_name_every_column(work: Path) -> None:
    assert first_cells("Extras") == set(rows(work, "extras"))
    assert first_cells("Tokenized dataset") == set(rows(work, "tokenized"))
    described = defaultdict(list)
    for table, column in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section("The store"), re.M):
        described[table].append(column)
    with closing(sqlite3.connect(work / "store.sqlite")) as store:
        tables = store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        found = {
            table: [column[1] for column in store.execute(f"PRAGMA table_info({table})")]
            for (table,) in tables
        }
        stages = {stage for (stage,) in store.execute("SELECT stage FROM results")}
    assert described == found
    assert stages == set(RESULTS)
    assert all(stage in section("The store") for stage in stages)


def test_folder_listing(work: Path) -> None:
    listing = PAGE.split("\n    work/\n")[1].split("\n\n")[0]
    named = set()
    for line in listing.splitlines():
        for name in re.split(r",?\s{2,}|, ", line.strip())[: 2 if ", README" in line else 1]:
            stem, braces, endings = name.partition("{")
            named |= {stem + e for e in endings.rstrip("}").split(",")} if braces else {stem}
    written = {str(file.relative_to(work)) for file in work.rglob("*") if file.is_file()}
    assert named - {"report.html"} == {name for name in written if not name.startswith(".")}


def test_options_on_the_page_exist() -> None:
    options = set(re.findall(r"(--[a-z][a-z-]+)", PAGE))
    assert options > {"--max-row-tokens", "--train-tokenizer"}
    shown = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).output
    assert not [option for option in options if option not in shown]
    assert ExportOptions().chat_template in PAGE
