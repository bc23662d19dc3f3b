"""The commands of the user's guide, run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from memento_pipeline.run.convert import Exit
from scenes import result_of, serving
from typer.core import TyperGroup
from typer.main import get_command

from memento_sgl.cli.app import app

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
TESTED = re.compile(r"<!-- tested -->\n```bash\n(.*?)```", re.DOTALL)
ADDRESS = "http://127.0.0.1:30000/v1"


@pytest.mark.timeout(240)
def test_the_guides_commands_work(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    # The script beside this interpreter, whatever the caller's PATH is.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = [line for block in TESTED.findall(GUIDE) for line in block.splitlines()]
    assert len(commands) > 12
    with serving() as server:
        for command in commands:
            done = subprocess.run(
                shlex.split(command.replace(ADDRESS, server.url)),
                cwd=tmp_path,
                env=os.environ | {"PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            # The canned judge may leave some traces below the gate.
            good = done.returncode in (Exit.OK, Exit.FILTERED)
            assert good, f"{command}\n{done.stdout}{done.stderr}"
    assert result_of(tmp_path / "by-hand") == result_of(tmp_path / "work")
    assert result_of(tmp_path / "merged") == result_of(tmp_path / "work")
    assert len(result_of(tmp_path / "work-paid")) == len(result_of(tmp_path / "work-llm")) == 5
    for name in ("default", "full", "extras"):
        assert (tmp_path / "work" / name / "train.parquet").is_file()


def test_the_guide_names_every_exit_code() -> None:
    named = {int(code) for code in re.findall(r"\b(\d+) ", GUIDE.split("Exit codes:")[1][:300])}
    assert named >= set(Exit) - {Exit.ERROR}


def test_what_the_guide_names_exists() -> None:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    options = {
        name
        for part in command.commands.values()
        for parameter in part.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE))
    assert len(named) > 30
    assert named <= options | {"--help"}
    files = re.findall(r"\b(?:benchmarks|tests/pipeline)/\w+\.py", GUIDE)
    assert len(files) >= 4
    assert all((ROOT / file).is_file() for file in files)
