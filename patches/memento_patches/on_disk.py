"""The same check as `guard.problems`, on the files of SGLang: importing it takes many seconds."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from memento_patches.ledger import Seam
from memento_sgl.errors import PatchError


def problems_on_disk(seams: Iterable[Seam]) -> list[str]:
    """What is wrong with the targets as they stand in SGLang's files; empty if all are as expected."""
    found = []
    for seam in seams:
        try:
            now = fingerprint_on_disk(seam.target)
        except PatchError as error:
            found.append(str(error))
            continue
        if now != seam.fingerprint:
            found.append(
                f"{seam.target} has changed (fingerprint {now}, expected {seam.fingerprint})"
            )
    return found


def fingerprint_on_disk(target: str) -> str:
    """`guard.fingerprint` of a target that stands as a function or method in a file.

    Raises:
        PatchError: it does not.
    """
    file, names = _file_of(target)
    text, tree = _parsed(file)
    node: ast.AST = tree
    for name in names:
        inner = [
            part
            for part in ast.iter_child_nodes(node)
            if isinstance(part, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and part.name == name
        ]
        if not inner:
            raise PatchError(f"{target} does not exist in {file}")
        node = inner[-1]
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
    lines = text.splitlines(keepends=True)[first - 1 : node.end_lineno]
    return hashlib.sha256(textwrap.dedent("".join(lines)).encode()).hexdigest()[:16]


def _file_of(target: str) -> tuple[Path, list[str]]:
    """The module's file, and the names inside it."""
    package, *names = target.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PatchError(f"{package} is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    while names:
        name = names.pop(0)
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py", names
        folder = folder / name
        if not folder.is_dir():
            break
    raise PatchError(f"{target} does not exist")


@lru_cache(maxsize=32)
def _parsed(file: Path) -> tuple[str, ast.Module]:
    text = file.read_text(encoding="utf-8")
    return text, ast.parse(text)
