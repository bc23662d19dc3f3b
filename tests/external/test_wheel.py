"""A wheel of this checkout, installed where nothing of it is: `pip install`, then the commands that
need neither torch nor SGLang."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.external, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    run(*pip, "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("memento_sgl-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    memento = programs / "memento"
    assert run(memento, "--version", cwd=tmp_path).startswith("memento-sgl ")
    assert "--memento-keep-last-n-blocks" in run(memento, "serve", "--help", cwd=tmp_path)
    run(memento, "convert", ROOT / "examples" / "traces.jsonl", "--out", "work", cwd=tmp_path)
    run(memento, "validate", "work/full", cwd=tmp_path)
    run(memento, "report", "work", cwd=tmp_path)
    run(memento, "view", "work", "--out", "page.html", cwd=tmp_path)
    assert "area" in run(memento, "simulate", "work", cwd=tmp_path)
    heavy = "import sys, memento_sgl, memento_frontend.native; print(*sys.modules)"
    loaded = run(programs / "python", "-c", heavy, cwd=tmp_path).split()
    assert not {"torch", "sglang"} & set(loaded)
