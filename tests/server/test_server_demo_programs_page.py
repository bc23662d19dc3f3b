"""The programs of docs/programs.md, README.md and examples/, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Served
from typer.core import TyperGroup
from typer.main import get_command

from memento_sgl.cli.app import app

pytest.importorskip("sglang")
pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- tested -->\n```python\n(.*?)```", PAGE, re.DOTALL)
ADDRESS = "http://127.0.0.1:30000"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("demo", "demo", "--chat-template", "memento_nosys")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "['a=12', 'b=22'] The total is 22."),
        (1, "a=12\nb=22\nThe total is 22."),
        (2, "BatchSummary(total=2, earlier=0, answered=2, failed=0)"),
        (3, "b=22<|summary_end|> </think>"),
    ],
)
def test_the_examples_work(server: Served, tmp_path: Path, number: int, said: str) -> None:
    code = EXAMPLES[number].replace(ADDRESS, server.url)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "error:::memento_frontend"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert len(EXAMPLES) == 4


def test_the_readmes_client(server: Served, tmp_path: Path) -> None:
    code, _ = re.findall(r"<!-- tested -->\n```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code.replace(ADDRESS, server.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, record = done.stdout.splitlines()
    assert said == "The total is 22."
    assert json.loads(record)[0]["blocks"] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ask.py", "The total is 32."),
        ("stream.py", "The total is 32."),
        ("many.py", "right"),
        ("notebook.ipynb", "with eviction"),
    ],
)
def test_the_programs_of_examples(server: Served, tmp_path: Path, name: str, said: str) -> None:
    code = (ROOT / "examples" / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = [cell for cell in json.loads(code)["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        code += "\nprint(found._repr_html_())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"MEMENTO_BASE_URL": server.url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_pages_options_exist() -> None:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    options = {name for parameter in command.commands["batch"].params for name in parameter.opts}
    named = set(re.findall(r"memento batch.*", PAGE)[0].split()) & set(
        re.findall(r"--[a-z-]+", PAGE)
    )
    assert named
    assert named <= options
