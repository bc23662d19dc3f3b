"""Writes docs/api.md from the docstrings of the modules that programs use; imports none of them.

python docs/make_api.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"memento_sgl": ROOT, "memento_frontend": ROOT / "frontend"}
MODULES = {
    "Serving in Python": [
        "memento_sgl.serve.engine", "memento_sgl.rule.config", "memento_sgl.errors",
    ],
    "The rule and its accounting": [
        "memento_sgl.rule.machine", "memento_sgl.rule.markers", "memento_sgl.rule.accounting",
        "memento_sgl.offline.simulate.replay", "memento_sgl.offline.reference",
        "memento_sgl.offline.rollout.record",
    ],
    "Asking a server": [
        "memento_frontend.results", "memento_frontend.options", "memento_frontend.native",
        "memento_frontend.one_call", "memento_frontend.endpoint", "memento_frontend.programs",
        "memento_frontend.batch",
    ],
    "Streams": [
        "memento_frontend.stream", "memento_frontend.events", "memento_frontend.collect",
        "memento_frontend.gauge",
    ],
}  # fmt: skip
HEAD = """# Python interface

Made from the docstrings by `python docs/make_api.py`; a test fails where it is not up to date.
Names that begin with an underscore, and modules that are not listed, may change without notice.
"""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, modules in MODULES.items():
        parts.append(f"## {title}\n")
        for module in modules:
            parts += _module(module)
    return "\n".join(parts).rstrip() + "\n"


def _module(name: str) -> Iterator[str]:
    package = name.partition(".")[0]
    path = FOLDERS[package].joinpath(*name.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield f"### `{name}`\n"
    yield _text(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _class(node)
        elif isinstance(node, Function) and _documented(node):
            yield f"#### `{_signature(node)}`\n"
            yield _text(node)


def _class(node: ast.ClassDef) -> Iterator[str]:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"#### class `{node.name}{f'({bases})' if bases else ''}`\n"
    yield _text(node)
    for part in node.body:
        if isinstance(part, Function) and _documented(part):
            mark = [ast.unparse(d) for d in part.decorator_list]
            kind = "property " if any("property" in d for d in mark) else ""
            text = ast.get_docstring(part) or ""
            first, _, rest = text.partition("\n")
            shown = part.name if kind else _signature(part)
            yield f"- {kind}`{shown}`: {first}"
            if rest.strip():
                yield textwrap.indent("\n" + _code(rest), "  ") + "\n"


def _documented(node: Function) -> bool:
    return not node.name.startswith("_") and ast.get_docstring(node) is not None


def _signature(node: Function) -> str:
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returns}"


def _text(node: ast.Module | ast.ClassDef | Function) -> str:
    return _code(ast.get_docstring(node) or "") + "\n"


def _code(text: str) -> str:
    """Paragraphs with indented lines (Args, Raises, drawings) keep their lines."""
    parts = re.split(r"\n\s*\n", text.strip("\n"))
    drawn = (re.search(r"^    ", part, re.MULTILINE) for part in parts)
    return "\n\n".join(
        f"```text\n{part}\n```" if is_drawn else part
        for part, is_drawn in zip(parts, drawn, strict=True)
    )


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
