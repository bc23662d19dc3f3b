"""Where options come from: command line, environment, configuration file; and addresses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from memento_frontend.client import Client, Question
from memento_frontend.native import NativeClient
from memento_pipeline.cli.build_options import endpoints_of
from memento_pipeline.llm.endpoints import Endpoint

from memento_sgl.address import api_root, server_root
from memento_sgl.cli import app as cli
from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.server import free_port
from memento_sgl.errors import ConfigError


@pytest.mark.parametrize(
    "written",
    [
        "http://a:1",
        "http://a:1/",
        "http://a:1/v1",
        "http://a:1/v1/",
        "http://a:1/v1/chat/completions",
    ],
)
def test_an_address_means_the_same_everywhere(written: str) -> None:
    assert api_root(written) == "http://a:1/v1"
    assert server_root(written) == "http://a:1"
    assert Client(Question("x", base_url=written))._url == "http://a:1/v1"
    assert NativeClient(written).base_url == "http://a:1"
    assert Endpoint.parse(written, "m").url == "http://a:1/v1"


def test_a_path_is_taken_as_it_is() -> None:
    assert api_root("https://host/v1beta/openai/") == "https://host/v1beta/openai"


@pytest.mark.parametrize("written", ["a:1", "ftp://a", "http://", "http://a:70000", "http://a:x"])
def test_what_is_no_address(written: str) -> None:
    for function in (api_root, server_root):
        with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
            function(written)


@pytest.mark.parametrize("written", ["http://me:secret@a:1/v1", "https://a/v1?key=secret"])
def test_a_secret_in_an_address_is_not_repeated(written: str) -> None:
    with pytest.raises(ConfigError, match="environment variable") as caught:
        api_root(written)
    assert "secret" not in str(caught.value)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.touch()
    monkeypatch.setenv("MEMENTO_CONFIG", str(path))
    monkeypatch.delenv("MEMENTO_BASE_URL", raising=False)
    return path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *line: str) -> str:
    monkeypatch.setattr(sys, "argv", ["memento", *line])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().err


def test_command_line_then_environment_then_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [free_port() for _ in range(4)]
    asked = ["think", "x"]
    file.write_text(f'base_url = "http://127.0.0.1:{ports[0]}"\n')
    assert f":{ports[0]}/v1 " in run(capsys, monkeypatch, *asked)
    file.write_text(file.read_text() + f'[think]\nbase-url = "http://127.0.0.1:{ports[1]}"\n')
    assert f":{ports[1]}/v1 " in run(capsys, monkeypatch, *asked)
    monkeypatch.setenv("MEMENTO_BASE_URL", f"http://127.0.0.1:{ports[2]}")
    assert f":{ports[2]}/v1 " in run(capsys, monkeypatch, *asked)
    line = [*asked, "--base-url", f"http://127.0.0.1:{ports[3]}"]
    assert f":{ports[3]}/v1 " in run(capsys, monkeypatch, *line)


def test_the_pipeline_asks_that_server_if_a_model_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoints_of({}) is None
    file.write_text('base_url = "http://a:1"')
    assert endpoints_of({}) is None  # the offline baseline stays what it is
    assert endpoints_of({"model": "rules"}) == ()
    assert endpoints_of({"model": "m"}) == (Endpoint(url="http://a:1/v1", model="m"),)
    monkeypatch.setenv("MEMENTO_BASE_URL", "http://b:1/v1")
    assert endpoints_of({"model": "m"}) == (Endpoint(url="http://b:1/v1", model="m"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[nope]\nx = 1", "no command 'nope'; there are: "),
        ("[think]\nnope = 1", "no option of [think] 'nope'; there are: "),
        ("nope = 1", "no key 'nope'; there are: api_key_env, base_url"),
        ("[think", "is not TOML"),
        ('[think]\ntemperature = "hot"', "Invalid value for '--temperature'"),
    ],
)
def test_mistakes_in_the_file(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
) -> None:
    file.write_text(text)
    said = run(capsys, monkeypatch, "think", "x", "--base-url", "http://127.0.0.1:1")
    assert message in said
    assert said.count("\n") == 1


def served(monkeypatch: pytest.MonkeyPatch, *line: str) -> list[str]:
    """The command that `memento serve` becomes."""
    pytest.importorskip("sglang")
    became: list[list[str]] = []

    class GoneError(Exception):
        pass

    def execute(_program: str, arguments: list[str]) -> None:
        became.append(arguments)
        raise GoneError

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr("memento_sgl.serve.launch.block_interrupts", lambda: None)
    monkeypatch.setattr(sys, "argv", ["memento", "serve", *line])
    with pytest.raises(GoneError):
        cli.main()
    return became[0][3:]


def test_the_served_name_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ["--port", str(free_port())]
    line = served(monkeypatch, "demo", *port)
    assert line[: line.index("--port")] == [
        "--model-path", str(MODEL_DIR), "--enable-memento", "--served-model-name", "demo",
        "--dtype", "float32",
    ]  # fmt: skip
    line = served(monkeypatch, str(MODEL_DIR), *port)
    assert line[line.index("--served-model-name") + 1] == "model"
    line = served(monkeypatch, "demo", *port, "--served-model-name", "mine")
    assert line.count("--served-model-name") == 1


def test_flags_of_the_server_from_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(
        f"[serve]\nport = {free_port()}\nmemento-debug = true\nenable-metrics = true\n"
        "disable-radix-cache = false\nmemento-keep-last-n-blocks = 1\n"
        "cuda-graph-bs-decode = [1, 2]\n"
    )
    line = served(monkeypatch, "demo", "--memento-keep-last-n-blocks", "2")
    given = line[line.index("--memento-debug") :]
    assert given == [
        "--memento-debug", "true", "--enable-metrics", "--memento-keep-last-n-blocks", "1",
        "--cuda-graph-bs-decode", "1", "2", "--memento-keep-last-n-blocks", "2",
    ]  # fmt: skip
