"""SGLang's source on disk, read without importing it: any version, installed anywhere."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from memento_sgl.errors import PatchError

PINNED = ("sglang", "torch", "transformers", "flashinfer-python", "xgrammar", "openai")


class Function(NamedTuple):
    """Where a function stands, and its text without indentation."""

    path: Path
    line: int
    text: str

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the text; that of `guard.fingerprint`."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def site_of(path: Path) -> Path:
    """The folder that holds the package `sglang`: `path` itself, or the one of that environment.

    Raises:
        PatchError: there is none.
    """
    for site in (path, *sorted(path.glob("lib/python3*/site-packages"))):
        if (site / "sglang" / "srt").is_dir():
            return site
    raise PatchError(f"no SGLang in {path}: name a site-packages folder or an environment")


def versions(site: Path) -> dict[str, str]:
    """Installed versions of SGLang and what its releases pin."""
    found = {d.name.lower(): d.version for d in distributions(path=[str(site)])}
    return {name: found[name] for name in PINNED if name in found}


def find(site: Path, target: str) -> Function | None:
    """The function behind a dotted name; None: there is none."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = site.joinpath(*parts[:length]).with_suffix(".py")
        if path.is_file():
            return _pick(path, parts[length:])
    return None


def namesakes(site: Path, target: str) -> Iterator[str]:
    """Functions of the same name elsewhere in SGLang: where a missing one may have gone."""
    name = target.rpartition(".")[2]
    for path in sorted((site / "sglang" / "srt").rglob("*.py")):
        if name.startswith("__") or f"def {name}(" not in path.read_text(errors="replace"):
            continue
        module = ".".join(path.relative_to(site).with_suffix("").parts)
        for where in _functions(_parse(path)):
            if where.rpartition(".")[2] == name:
                yield f"{module}.{where}"


def _functions(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{child.name}"


def _pick(path: Path, names: list[str]) -> Function | None:
    node: ast.AST = _parse(path)
    for name in names:
        found = [
            child
            for child in getattr(node, "body", ())
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and child.name == name
        ]
        if not found:
            return None
        node = found[-1]  # the last definition is the one that counts
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[first - 1 : node.end_lineno]
    return Function(path, first, textwrap.dedent("".join(lines)))


@lru_cache(maxsize=32)
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
