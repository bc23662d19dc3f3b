"""examples/ and the Dockerfiles: what can be checked without a server or Docker."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from memento_sgl.cli.app import app
from memento_sgl.cli.user_config import load
from memento_sgl.serve.checks import parse

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_index_lists_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.iterdir():
        assert file.name == "README.md" or f"({file.name})" in index, file.name


def test_the_notebook_holds_no_output() -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_the_configuration_page_shows_a_valid_file(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "config.toml"
    path.write_text(text)
    found = load(path)
    assert (
        tomllib.loads(text).keys() == found.keys() == {"base_url", "api_key_env", "think", "serve"}
    )
    options = {p.name for p in get_command(app).commands["think"].params}  # type: ignore[attr-defined]
    assert found["think"].keys() <= options


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_dockerfiles_run_the_command_line(name: str) -> None:
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    (entry,), (command,) = (re.findall(rf"^{k} (.*)$", text, re.M) for k in ("ENTRYPOINT", "CMD"))
    assert json.loads(entry) == ["memento"]
    serve, model, *flags = json.loads(command)
    assert (serve, model) == ("serve", "demo")
    assert parse(flags).host == "0.0.0.0"
    assert "pip install --no-cache-dir '/src[serve]'" in text
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv"} <= set(ignored)
