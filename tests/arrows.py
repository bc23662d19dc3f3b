"""The architecture as data: which place may use which at run time. Read by `test_structure.py`,
drawn by `docs/make_structure.py`.

A place is a folder, or a module beside the folders, of one of the four packages. Imports under
`if TYPE_CHECKING` do not count, those inside functions do. What a line does not name is forbidden.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "memento_sgl": ROOT / "memento_sgl",
    "memento_patches": ROOT / "patches/memento_patches",
    "memento_frontend": ROOT / "frontend/memento_frontend",
    "memento_pipeline": ROOT / "pipeline/memento_pipeline",
}
BASE = {"errors", "exit_codes", "environment", "address", "templates", "chat_template"}
"""Modules beside the folders of memento_sgl, for everybody."""

# What each place uses besides `BASE`; the order is that of the layers.
ARROWS = {
    "memento_sgl": {
        "rule": set(),
        "request": {"rule"},
        "observe": {"rule"},
        "cache": {"rule", "request"},
        "admission": {"rule", "request"},
        "engine": {"rule", "request", "observe", "admission"},
        # SGLang's plug-in loader may come too late for a server built in Python: `enable` asks it.
        "serve": {"rule", "request", "cache", "observe", "engine", "memento_patches"},
        "offline": {"rule", "observe"},
        "cpu": {"offline"},
        "training": {"rule", "offline"},
        "demo": {"rule", "observe", "offline"},
        "ui": {"rule", "offline"},
        # The one command line over all packages; `doctor` reads the ledger.
        "cli": {
            "rule", "observe", "serve", "offline", "training", "demo", "memento_patches",
            "memento_frontend", "memento_pipeline",
        },
    },
    "memento_pipeline": {
        "records": set(),
        "text": {"records", "memento_sgl"},
        "read": {"records", "text", "memento_sgl"},
        "output": {"records", "text", "read", "memento_sgl"},
        "store": {"records"},
        "llm": {"records", "store"},
        "stages": {"records", "text", "llm"},
        "run": {"records", "text", "read", "output", "store", "llm", "stages"},
        "report": {"records", "output", "store", "run", "memento_sgl"},
        "checkpoint": {"text", "output", "memento_sgl"},
        "cli": {
            "records", "text", "read", "output", "store", "llm", "stages", "run", "report",
            "checkpoint", "memento_sgl",
        },
    },
}  # fmt: skip
OLD_NAMES = {"rollout", "reference", "simulate", "config", "machine", "markers", "moved"}
"""Modules that only point to where a public name has gone."""


def run_time_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports of a module but those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from run_time_imports(node)


def used(path: Path) -> set[tuple[str, str]]:
    """Package and place of everything of this project that a module uses."""
    found = set()
    for node in run_time_imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for package, place, *_ in (f"{name}..".split(".") for name in names):
            if package in PACKAGES:
                here = PACKAGES[package] / place
                is_place = bool(place) and (here.is_dir() or here.with_suffix(".py").is_file())
                found.add((package, place if is_place else ""))
    return found


def arrows(package: str) -> dict[str, dict[str, Path]]:
    """What each place of a package uses, and a module that does: places of the package itself, and
    other packages by name."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(PACKAGES[package].rglob("*.py")):
        place = path.relative_to(PACKAGES[package]).with_suffix("").parts[0]
        for other, target in used(path):
            base = other == "memento_sgl" and (target in BASE or not target)
            if base or (other == package and target in (place, "")):
                continue
            found.setdefault(place, {})[target if other == package else other] = path
    return found
