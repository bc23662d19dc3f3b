"""docs/structure.md names every module of the four packages once, in the entry of its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "memento_sgl/": ROOT / "memento_sgl",
    "patches/memento_patches/": ROOT / "patches/memento_patches",
    "frontend/memento_frontend/": ROOT / "frontend/memento_frontend",
    "pipeline/memento_pipeline/": ROOT / "pipeline/memento_pipeline",
}


def named(package: str) -> list[str]:
    """Paths of modules below the package, as the page lists them.

    An entry begins with its folder (`cache/`) or with words: then its modules lie in the package.
    A line below names modules by their file names; names with a folder are mentions.
    """
    page = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
    section = page.split(f"### `{package}`\n")[1].split("\n## ")[0].split("\n### ")[0]
    found = []
    for entry in re.split(r"^- ", section, flags=re.MULTILINE)[1:]:
        folder = re.match(r"`([a-z_/]+/)` ", entry)
        names = re.findall(r"`([a-z_]+\.py)`", entry)
        found += [f"{folder[1] if folder else ''}{name}" for name in names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_names_every_module_once(package: str) -> None:
    folder = PACKAGES[package]
    modules = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.py") if path.name != "__init__.py"
    )
    assert modules
    assert sorted(named(package)) == modules
