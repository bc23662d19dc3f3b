"""How the command line starts: what it may import, how a mistake and Ctrl-C look."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from memento_patches.ledger import SGLANG_VERSION
from typer.core import TyperGroup
from typer.main import get_command

from memento_sgl import __version__
from memento_sgl.cli.app import app
from memento_sgl.demo.server import free_port
from memento_sgl.environment import has_accelerator
from memento_sgl.errors import ConfigError, DataError, ServerError, StoppedError, StoreError
from memento_sgl.exit_codes import as_exit_code

# Runs each command line of a JSON list in one process: exit code, standard output and error, and
# what has been imported by then.
SCRIPT = """
import io, json, os, sys
for name in os.environ.get("WITHOUT", "").split():
    sys.modules[name] = None
from contextlib import redirect_stderr, redirect_stdout
from memento_sgl.cli.app import main

done = []
for case in json.load(open(sys.argv[1])):
    sys.argv = ["memento", *case["arguments"]]
    data = io.BytesIO(bytes.fromhex(case["stdin"]))
    sys.stdin = io.TextIOWrapper(data, encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        code = repr(error)
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    done.append([code, out.getvalue(), err.getvalue(), loaded])
sys.stdout.write(json.dumps(done))
"""
ROOT = Path(__file__).parents[2]
HEAVY = {"numpy", "pyarrow", "httpx", "openai", "jinja2", "tokenizers", "torch", "sglang", "ray"}
Done = tuple[Any, str, str, list[str]]


def run(cases: list[list[str]], folder: Path, *, stdin: bytes = b"", **environment: str) -> Any:
    file = folder / "cases.json"
    file.write_text(json.dumps([{"arguments": c, "stdin": stdin.hex()} for c in cases]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(file)],
        cwd=folder,
        env=os.environ | {"COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def commands() -> dict[str, Any]:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return command.commands


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    light = [name for name in commands() if name != "serve"]
    cases = [["--version"], ["--help"], *([name, "--help"] for name in light)]
    found = run(cases, tmp_path)
    assert found[0][:3] == [0, f"memento-sgl {__version__}\n", ""]
    for case, (code, out, err, loaded) in zip(cases, found, strict=True):
        assert (code, err) == (0, ""), case
        assert "Usage: memento" in out or case == ["--version"]
        assert not HEAVY & set(loaded), case


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("[a] is wrong"), 2, "error: [a] is wrong"),
        (DataError("x"), 2, "error: x"),
        (StoppedError("x"), 5, "error: x"),
        (StoreError("x"), 6, "error: x"),
        (ServerError("x " * 200), 1, "error: " + ("x " * 200).rstrip()),
        (KeyboardInterrupt(), 130, "interrupted: again"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail() -> int:
        raise error

    assert as_exit_code(fail, "again") == code
    assert [line.rstrip() for line in capsys.readouterr().err.splitlines()] == [said]
    assert as_exit_code(lambda: 3, "again") == 3


def test_help_needs_no_extra(tmp_path: Path) -> None:
    """As after `pip install .` alone."""
    absent = "torch sglang transformers msgspec psutil plotext prometheus_client ray trl peft"
    cases = [[name, "--help"] for name in commands()]
    found = run(cases, tmp_path, WITHOUT=absent)
    for case, (code, out, err, _) in zip(cases, found, strict=True):
        assert (code, err) == (0, ""), case
        assert "Usage: memento" in out


def test_serve_help_lists_sglangs_flags(tmp_path: Path) -> None:
    ((_, out, _, loaded),) = run([["serve", "demo", "--help"]], tmp_path)
    for flag in ("--memento-keep-last-n-blocks", "--tp-size", "--mem-fraction-static"):
        assert flag in out
    assert out.index("--memento-debug") < out.index("--mem-fraction-static")
    assert not {"sglang", "torch"} & set(loaded)


def test_an_option_has_one_name() -> None:
    names: dict[str, set[tuple[str, ...]]] = {}
    parameters: dict[str, set[str]] = {}
    for command in commands().values():
        for parameter in command.params:
            if not parameter.opts[0].startswith("-"):
                continue
            flags = (*parameter.opts, *parameter.secondary_opts)
            names.setdefault(parameter.name, set()).add(flags)
            parameters.setdefault(flags[0], set()).add(parameter.name)
    assert "max_summary_tokens" in names
    assert {name: flags for name, flags in names.items() if len(flags) > 1} == {}
    # A parameter cannot be called `json`, `open` or `template` everywhere, but it is one option.
    assert {flag for flag, found in parameters.items() if len(found) > 1} <= {
        "--json", "--chat-template",
    }  # fmt: skip


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_mistakes_are_one_line(tmp_path: Path, taken: int) -> None:
    free = str(free_port())
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes(b"\xff\xfe\x00")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (llama / "model.safetensors").touch()
    serve = ["serve", "demo", "--port", free]
    expected = [
        (["nope"], "No such command 'nope'"),
        (["think", "--nope"], "No such option: --nope"),
        (["think"], "Missing argument"),
        (["think", "x", "--base-url", "here"], "base URL 'here': expected http://HOST:PORT"),
        (["think", "x", "--base-url", "http://here:99999"], "expected http://HOST:PORT"),
        (["serve", "demo", "--port", "99999"], "--port 99999: ports are 1 to 65535"),
        (["serve", "demo", "--port", "0"], "--port 0: ports are 1 to 65535"),
        (["serve", "demo", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["serve", "demo", "--port", str(taken)], f"port {taken} of 127.0.0.1 is in use"),
        (["serve", "demo", "--host", "192.0.2.1"], "cannot listen on port"),
        (["serve", "./nowhere"], "no model at ./nowhere"),
        (["serve", "no-one/nothing"], "no model no-one/nothing: there is no such folder"),
        (["serve", str(empty)], "it has no config.json"),
        (["serve", str(damaged)], "config.json cannot be used"),
        (["serve", str(bare)], "it holds no weights"),
        (["serve", str(llama)], "mask_delimiters=auto does not know the model family"),
        ([*serve, "--memento-keep-last", "1"], "did you mean --memento-keep-last-n-blocks?"),
        ([*serve, "--memento-max-blocsk", "1"], "did you mean --memento-max-blocks?"),
        (
            [*serve, "--enable-mement"],
            "no such flag: --enable-mement (did you mean --enable-memento?)",
        ),
        ([*serve, "--mem-fracton-static", "1"], "did you mean --mem-fraction-static?"),
        ([*serve, "--tp-size"], "expected one argument"),
        ([*serve, "more"], "what is 'more'?"),
        ([*serve, "--model-path", "x"], "leave out --model-path"),
        ([*serve, "--memento-keep-last-n-blocks", "x"], "not a number"),
        ([*serve, "--memento-config", '{"keep": 1}'], "unknown option 'keep'"),
        ([*serve, "--chat-template", "nowhere"], "no chat template at nowhere"),
    ]
    found = run([case for case, _ in expected], tmp_path, HF_HUB_OFFLINE="1")
    for (case, message), (code, out, err, loaded) in zip(expected, found, strict=True):
        assert (code, out) == (2, ""), (case, err)
        assert err.count("\n") == 1, (case, err)
        assert message in err, case
        assert not {"sglang", "torch"} & set(loaded), case


def test_files_that_are_empty_or_no_text(tmp_path: Path) -> None:
    noise = bytes(range(256)) * 8
    cases = []
    for suffix in ("jsonl", "json", "parquet", "txt"):
        for name, data in (("empty", b""), ("noise", noise)):
            file = f"{name}.{suffix}"
            (tmp_path / file).write_bytes(data)
            cases += [
                ["convert", file, "--out", f"out-{file}"],
                ["validate", file],
                ["simulate", file],
                ["view", file, "--out", "page.html"],
                ["trace", file],
                ["batch", file, "--out", "answers.jsonl", "--base-url", "http://127.0.0.1:1"],
                ["batch", "one.jsonl", "--out", "answers.jsonl", "--json-schema", file],
                ["report", file],
                ["init-model", file, "new"],
                ["simulate", "one.jsonl", "--tokenizer", file],
                ["simulate", "one.jsonl", "--model", file],
                ["simulate", "one.jsonl", "--memento-config", file],
                ["convert", "one.jsonl", "--out", "out", "--tokenizer", file],
                ["convert", "one.jsonl", "--out", "out", "--train-tokenizer", file],
            ]
    (tmp_path / "one.jsonl").write_text('{"question": "x", "response": "y"}\n')
    cases.append(["convert", "one.jsonl", "--out", "out", "--chat-template", "noise.txt"])
    cases.append(["serve", "demo", "--memento-config", "noise.txt"])
    for case, (code, out, err, _) in zip(cases, run(cases, tmp_path), strict=True):
        assert isinstance(code, int), (case, code)
        assert code > 0, case
        assert "Traceback" not in out + err, case
        assert len((out + err).splitlines()) <= 20, (case, out, err)
    # The first of them, as the user sees them.
    converted = dict(zip(map(tuple, cases), run(cases[:1] + cases[14:15], tmp_path), strict=False))
    (code, out, err, _), *_ = converted.values()
    assert (code, out) == (2, "")
    assert err == "error empty.jsonl: no rows, there is nothing to convert\n"


@pytest.mark.parametrize(
    ("data", "message"), [(b"\xff\x00\xfe", "no UTF-8 text (byte 0)"), (b" \n", "is empty")]
)
def test_what_comes_on_standard_input_is_no_question(
    tmp_path: Path, data: bytes, message: str
) -> None:
    ((code, out, err, _),) = run([["think", "-"]], tmp_path, stdin=data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


DOCTOR = """
import dataclasses, sys
import memento_patches.ledger as ledger
from memento_sgl.cli.app import main

if sys.argv.pop() == "changed":
    first = dataclasses.replace(ledger.LEDGER[0], fingerprint="0" * 16)
    ledger.LEDGER = (first, *ledger.LEDGER[1:])
sys.argv = ["memento", "doctor"]
try:
    main()
finally:
    assert not {"sglang", "torch"} & sys.modules.keys()
"""


@pytest.mark.parametrize("state", ["whole", "changed"])
def test_doctor_looks_without_importing(state: str) -> None:
    pytest.importorskip("sglang")
    if has_accelerator():
        pytest.skip("torch is imported to name the accelerator")
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR, state],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert f"sglang       {SGLANG_VERSION}" in lines
    if state == "whole":
        assert (done.returncode, lines[-1]) == (0, "ready to serve")
    else:
        assert done.returncode == 1
        assert "ServerArgs.add_cli_args has changed" in done.stdout
        assert lines[-1].startswith("not ready to serve")


IMPORTING = """
import importlib.abc, os, signal, sys, tomllib

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Press(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "memento_sgl.cli.trace":
            os.kill(os.getpid(), signal.SIGINT)

(script,) = tomllib.load(open(sys.argv[1], "rb"))["project"]["scripts"].values()
module, _, function = script.partition(":")
found = getattr(__import__(module, fromlist=[function]), function)
sys.meta_path.insert(0, Press())
sys.argv = ["memento", "think", "x"]
found()
"""


def test_ctrl_c_while_everything_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(ROOT / "pyproject.toml")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def blocked(process: psutil.Process) -> bool:
    """Whether a process keeps SIGINT from its main thread."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(status.split("SigBlk:")[1].split()[0], 16)
    return bool(mask >> (signal.SIGINT - 1) & 1)


def test_ctrl_c_while_a_server_starts() -> None:
    pytest.importorskip("sglang")
    server = subprocess.Popen(
        [sys.executable, "-m", "memento_sgl.cli.app", "serve", "demo", "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        process = psutil.Process(server.pid)
        while "memento_sgl.serve.launch" not in process.cmdline() or not blocked(process):
            assert server.poll() is None
            time.sleep(0.01)
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        said, _ = server.communicate(timeout=60)
    finally:
        server.kill()
    assert said == "memento: stopped\n"
    assert server.returncode == 130
