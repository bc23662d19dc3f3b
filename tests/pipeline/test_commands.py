"""The command line: what it says, what it refuses, how it exits."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from memento_pipeline.cli import convert as commands
from memento_pipeline.cli.build_options import PARTS, build
from memento_pipeline.run.convert import Exit
from memento_pipeline.store.folder import Store
from scenes import result_of, serving, write_traces
from typer.testing import CliRunner, Result

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError

COMMANDS = ("convert", "split", "score", "segment", "summarize", "assemble", "merge")
TRACES = 4


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_traces(tmp_path_factory.mktemp("input") / "traces.jsonl", TRACES)


def memento(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    said = memento(command, "--help")
    assert said.exit_code == 0
    assert f"memento {command} " in said.output.replace("Usage: memento", "")


def test_every_option_of_the_records_can_be_given() -> None:
    values = {
        **{"out": Path("w"), "inputs": [Path("t")], "model": "m", "base_url": "http://h/v1"},
        **{"window": 8, "tries": 2, "penalty": 0.7, "min_block_tokens": 50, "rounds": 1},
        **{"max_block_tokens": 900, "max_tokens": 4000, "temperature": 0.5, "shard": "2/3"},
        **{"gate_problems": False, "extra_body": '{"top_k": 5}', "limit": None},
        **{"tokenizer": "approx-1", "column": ["id=key"], "max_trace_tokens": 9000},
        **{"max_row_tokens": 8000, "too_long": "cut", "train_tokenizer": Path("t")},
    }
    options = build(values)
    assert (options.score.window, options.score.tries, options.summarize.tries) == (8, 2, 2)
    assert (options.segment.min_tokens, options.segment.max_tokens) == (50, 900)
    assert options.ask.max_tokens == 4000
    assert (options.read.columns, options.read.max_tokens) == ({"id": "key"}, 9000)
    assert (options.rows.max_tokens, options.rows.too_long) == (8000, "cut")
    assert (options.tokenizer, options.export.tokenizer) == ("approx-1", Path("t"))
    assert options.ask.sampling() == {"temperature": 0.5, "max_tokens": 4000, "top_k": 5}
    assert str(options.shard) == "2/3"
    assert not options.summarize.gate_problems
    # What was recorded is the base, what is given now counts.
    again = build({"out": Path("w"), "window": 4}, options.model_dump_json())
    assert again.score.window == 4
    assert again.segment.penalty == 0.7
    assert again.endpoints == options.endpoints


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "m"], "needs an endpoint"),
        (["--base-url", "http://h/v1"], "has no model"),
        (["--model", "rules", "--base-url", "http://h/v1"], "uses no endpoint"),
        (["--shard", "4/3"], "--shard"),
        (["--redo", "everything"], "the stages are"),
        (["--window", "0"], "--window"),
        (["--extra-body", "[]"], "JSON object"),
        (["--tokenizer", "/nowhere"], "no tokenizer"),
        (["--ray", "2", "--redo", "split"], "--ray goes with neither"),
        (["--budget", "1", "--model", "m", "--base-url", "http://h/v1"], "--price-in"),
    ],
)
def test_usage_errors_say_what_to_change(
    traces: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    result = memento("convert", traces, "--out", tmp_path / "w", *arguments)
    assert result.exit_code == Exit.USAGE, result.output
    assert said in re.sub(r"\s+", " ", result.output)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--tokenizer", "--train-tokenizer", "--chat-template"])
def test_missing_files_are_found_before_anything_is_paid(
    traces: Path, tmp_path: Path, option: str
) -> None:
    with serving() as server:
        where = ["--model", "canned", "--base-url", server.url]
        result = memento("convert", traces, "--out", tmp_path / "w", *where, option, "/nowhere")
    assert result.exit_code == Exit.USAGE, result.output
    assert server.calls["all"] == 0
    assert not (tmp_path / "w").exists()


def test_every_field_of_the_options_has_an_option() -> None:
    given = set(inspect.signature(commands.convert).parameters)
    internal = {"backoff", "most_backoff", "strict_max", "columns"}  # columns: --column
    for kind, renamed in PARTS.values():
        names = {field.name for field in fields(kind)} if is_dataclass(kind) else kind.model_fields
        assert {renamed.get(name, name) for name in names} - internal <= given


def test_an_endpoint_that_is_not_there_is_diagnosed(traces: Path, tmp_path: Path) -> None:
    where = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    result = memento("convert", traces, "--out", tmp_path, *where)
    assert result.exit_code == Exit.STOPPED
    assert "cannot be reached" in re.sub(r"\s+", " ", result.output)
    assert "--resume" in result.output
    assert result_of(tmp_path) == []


def test_a_preview_does_not_limit_the_folder(traces: Path, tmp_path: Path) -> None:
    assert memento("convert", traces, "--out", tmp_path, "--preview", 1).exit_code == 0
    assert len(result_of(tmp_path)) == 1
    assert memento("convert", "--out", tmp_path, "--resume").exit_code == 0
    assert len(result_of(tmp_path)) == TRACES
    assert memento("convert", traces, "--out", tmp_path / "b", "--limit", 2).exit_code == 0
    assert memento("convert", "--out", tmp_path / "b", "--resume").exit_code == 0
    assert len(result_of(tmp_path / "b")) == 2


def test_a_merged_folder_can_be_resumed(traces: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "one", tmp_path / "two"]
    for number, part in enumerate(parts, 1):
        assert memento("convert", traces, "--out", part, "--shard", f"{number}/2").exit_code == 0
    merged = tmp_path / "merged"
    assert memento("merge", *parts, "--out", merged).exit_code == 0
    assert memento("convert", traces, "--out", tmp_path / "whole").exit_code == 0
    for name in ("default", "full", "extras"):
        rows = [(tmp_path / f / name / "train.jsonl").read_bytes() for f in ("merged", "whole")]
        assert rows[0] == rows[1]
    resumed = memento("convert", "--out", merged, "--resume")
    assert resumed.exit_code == 0, resumed.output


def test_a_full_disk_is_explained(traces: Path, tmp_path: Path) -> None:
    memento_script = f"{sys.executable} -m memento_sgl.cli.app"
    arguments = f"convert {traces} --out {tmp_path}"
    script = f"trap '' XFSZ; ulimit -f 60; exec {memento_script} {arguments}"  # blocks of 1 KiB
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.STOPPED, done.stderr
    assert "Free disk space" in done.stderr
    assert "Traceback" not in done.stderr
    assert memento("convert", "--out", tmp_path, "--resume").exit_code == 0
    assert len(result_of(tmp_path)) == TRACES


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "memento-sgl":
            return "1"
        raise PackageNotFoundError(name)

    monkeypatch.setattr("memento_sgl.cli.serve.version", version)
    result = memento("doctor")
    assert result.exit_code == 1
    assert "pip install 'memento-sgl[serve]'" in result.output
    assert "pipeline" in result.output


@pytest.mark.parametrize("command", [["serve", "demo"], ["demo"]])
def test_serving_without_sglang_says_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memento_sgl.cli.serve.find_spec", lambda _: None)
    result = memento(*command)
    assert isinstance(result.exception, ConfigError)  # which `main` turns into one line
    assert str(result.exception) == (
        "sglang and torch not installed: pip install 'memento-sgl[serve]'"
    )


def test_missing_input(tmp_path: Path) -> None:
    out = tmp_path / "none"
    assert memento("convert", "--out", out).exit_code == Exit.USAGE
    assert memento("convert", tmp_path / "no-such-file", "--out", out).exit_code == Exit.USAGE
    assert not out.exists()


def test_dry_run_shows_cost_and_writes_nothing(traces: Path, tmp_path: Path) -> None:
    where = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    prices = ["--price-in", 1, "--price-out", 2]
    result = memento("convert", traces, "--out", tmp_path / "w", *where, *prices, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "$0." in result.output
    assert re.search(r"traces\s*│\s*4 ", result.output)
    assert not (tmp_path / "w").exists()


def test_preview_prints_rows_that_a_full_run_does_not_pay_again(
    traces: Path, tmp_path: Path
) -> None:
    with serving() as server:
        where = ["--model", "canned", "--base-url", server.url, "--gate-mean", 0, "--gate-least", 0]
        shown = memento("convert", traces, "--out", tmp_path, *where, "--preview", 2)
        assert shown.exit_code == 0, shown.output
        assert "memento 1" in shown.output
        assert len(result_of(tmp_path)) == 2
        whole = memento("convert", traces, "--out", tmp_path, *where)
        assert whole.exit_code == 0, whole.output
    assert len(result_of(tmp_path)) == TRACES
    assert max(server.by_key.values()) == 1


def test_exit_codes(traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG_KEY", "sk-wrong")
    with serving(key="sk-right") as server:
        where = ["--model", "m", "--base-url", server.url, "--api-key-env", "WRONG_KEY"]
        stopped = memento("convert", traces, "--out", tmp_path / "w", *where)
        assert stopped.exit_code == Exit.STOPPED
        assert "WRONG_KEY" in stopped.output
        assert "--resume" in stopped.output
        assert not list((tmp_path / "w").glob("*.parquet"))
        changed = memento("convert", traces, "--out", tmp_path / "w", *where, "--window", 4)
        assert changed.exit_code == Exit.STORE
        assert "window was 16, now 4" in re.sub(r"\s+", " ", changed.output)
        with Store(tmp_path / "w"):
            locked = memento("convert", traces, "--out", tmp_path / "w", *where)
        assert locked.exit_code == Exit.STORE
        assert "in use by process" in re.sub(r"\s+", " ", locked.output)
        server.settings.key = "sk-wrong"
        server.settings.faults = {"empty": 1.0}
        failed = memento("convert", "--out", tmp_path / "w", "--resume", "--tries", 2)
        assert failed.exit_code == Exit.FAILED, failed.output
        assert "--retry-failed" in failed.output
        server.settings.faults = {}
        gate = ["--gate-mean", 0, "--gate-least", 0, "--redo", "summarize"]
        again = memento("convert", "--out", tmp_path / "w", "--resume", "--retry-failed", *gate)
        assert again.exit_code == 0, again.output
    everything = b"".join(
        file.read_bytes() for file in (tmp_path / "w").rglob("*") if file.is_file()
    )
    assert b"sk-wrong" not in everything
    assert memento("convert", "--out", tmp_path / "none", "--resume").exit_code == Exit.STORE


def test_stage_by_stage(traces: Path, tmp_path: Path) -> None:
    with serving() as server:
        where = ["--model", "canned", "--base-url", server.url]
        gate = ["--gate-mean", 0, "--gate-least", 0]
        assert memento("convert", traces, "--out", tmp_path / "a", *where, *gate).exit_code == 0
        out = ["--out", tmp_path / "b"]
        for arguments in (
            ["split", traces],
            ["score", *where],
            ["segment", "--penalty", 0.9],
            ["segment", "--penalty", 0.5, "--redo"],
            ["summarize", *gate],
            ["assemble"],
        ):
            done = memento(*arguments, *out)
            assert done.exit_code == 0, done.output
    assert result_of(tmp_path / "b") == result_of(tmp_path / "a")
    for name in ("a", "b"):
        made = {file.name for file in (tmp_path / name).rglob("*") if file.suffix == ".parquet"}
        assert made


def test_logs_are_json_lines(traces: Path, tmp_path: Path) -> None:
    assert memento("convert", traces, "--out", tmp_path, "--quiet").output == ""
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert entries[0]["message"] == "run starts"
    assert entries[-1]["message"] == "run ends"
    assert entries[0]["models"] == ["rules"]


def test_no_torch_no_sglang(traces: Path, tmp_path: Path) -> None:
    code = "import sys; from memento_sgl.cli.app import app\n"
    code += "app(sys.argv[1:], standalone_mode=False)\n"
    code += "assert not {'torch', 'sglang', 'transformers'} & set(sys.modules), 'heavy import'"
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        str(traces),
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (Exit.OK, Exit.FILTERED), done.stderr
    assert (tmp_path / "store.sqlite").exists()


def test_endpoint_options_are_not_dropped() -> None:
    options = build({"out": Path("w"), "endpoint": ["http://a/v1,,x", "http://b/v1"], "model": "y"})
    assert [(e.url, e.model) for e in options.endpoints] == [
        ("http://a/v1", "x"),
        ("http://b/v1", "y"),
    ]
    with pytest.raises(ConfigError, match="needs an endpoint"):
        build({"out": Path("w"), "model": "m"})
