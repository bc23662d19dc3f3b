"""No snippet of README and docs goes untested: programs are run by the tests named here, and every
`memento` command line is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from memento_sgl.cli.app import app
from memento_sgl.serve.checks import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(<!-- tested -->\n)?^```(\w+)( \w+)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN_BY = {
    "README.md": "tests/server/test_server_demo_programs_page.py tests/server/test_engine.py",
    "openai.md": "tests/server/test_server_demo_openai.py",
    "pipeline.md": "tests/pipeline/test_docs.py",
    "programs.md": "tests/server/test_server_demo_programs_page.py",
    "rollouts.md": "tests/server/test_server_overlap_rollouts.py",
    "scale.md": "tests/server/test_engine.py",
    "simulate.md": "tests/offline/test_trace_docs.py",
    "stream.md": "tests/server/test_server_demo_think.py",
    "think.md": "tests/server/test_server_demo_think.py",
    "view.md": "tests/offline/test_trace_docs.py",
}
# Compared with the real thing by the tests of their area.
DATA = {"json", "yaml", "toml", "text", "mermaid"}


def test_every_program_is_run_by_a_test() -> None:
    for page in PAGES:
        for tested, language, note, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in DATA:
                continue
            about = f"{page.name}: {code.splitlines()[0]}"
            assert tested or note == " tested", f"{about} is not marked as tested"
            assert page.name in RUN_BY, f"{about} is run by no test"
    for name, tests in RUN_BY.items():
        for test in tests.split():
            text = (ROOT / test).read_text(encoding="utf-8")
            assert name.removesuffix(".md") in text, f"{test} does not read {name}"


def command_lines(page: Path) -> list[str]:
    """Lines of fences and indented blocks that call `memento`, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = [line for *_, code in FENCE.findall(text) for line in code.splitlines()]
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    found = []
    for line in fenced + indented:
        start = re.match(r"(?:echo .* \| |\$ )?(memento [a-z][a-z-]*( .*)?$)", line)
        if start and "..." not in line and "`" not in line:
            found.append(re.split(r" [<>|] | && |  #", start.group(1))[0])
    return found


LINES = [(page.name, line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_are_taken(page: str, line: str) -> None:
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    name, *arguments = shlex.split(line, comments=True)[1:]
    assert name in root.commands, page
    context = root.commands[name].make_context(name, arguments)
    if name == "serve":
        parse(context.args)


def test_there_are_command_lines() -> None:
    assert len(LINES) > 40
    assert {page for page, _ in LINES} > {"README.md", "pipeline.md", "simulate.md", "traces.md"}
