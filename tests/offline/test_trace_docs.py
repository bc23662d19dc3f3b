"""The examples of docs/simulate.md and docs/view.md, run as they stand there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.offline.rollout.record import RolloutRecord
from memento_sgl.offline.simulate.model_shape import SHAPES

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("simulate", "view", "rollouts")
}
COMMANDS = re.compile(r"<!-- tested -->\n```bash\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python tested\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", ["simulate", "view"])
def test_commands_and_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    commands = COMMANDS.findall(PAGES[name])[0].splitlines()
    assert len(commands) > 2
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}"
    if name == "view":
        assert Path("page.html").is_file()
        assert Path("memento-view.html").is_file()
        return
    (code,) = PYTHON.findall(PAGES[name])
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_pages_name_what_exists() -> None:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    options = {
        option
        for name in ("simulate", "view", "convert")
        for parameter in command.commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGES["simulate"] + PAGES["view"]))
    assert len(named) > 8
    assert named <= options
    assert all(f"`{shape}`" in PAGES["simulate"] for shape in SHAPES)
    fields = PAGES["rollouts"].split("## Fields")[1]
    assert all(f"`{field}`" in fields for field in RolloutRecord.model_fields)
