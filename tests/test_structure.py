"""Who may import whom; what the light parts may not need."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from arrows import ARROWS, BASE, OLD_NAMES, PACKAGES, ROOT, arrows

RUNTIME = {
    "memento_sgl/cpu/platform.py",
    "memento_sgl/serve/engine.py",
    "memento_sgl/cache/kv_events.py",
    "memento_sgl/cache/paged.py",
    "memento_sgl/cache/requests.py",
    "memento_sgl/cache/tree.py",
    "memento_sgl/serve/reasoning_parser.py",
    "memento_sgl/admission/budget.py",
    "memento_sgl/serve/arguments.py",
    "memento_sgl/serve/radix.py",
    "memento_sgl/engine/scheduler_access.py",
    "memento_sgl/engine/staging.py",
    "memento_sgl/serve/launch.py",
    "memento_sgl/serve/sglang_flags.py",
    "memento_sgl/observe/observers.py",
}

PROGRAMS = {  # SGLang's frontend language, never its runtime
    "frontend/memento_frontend/endpoint.py",
    "frontend/memento_frontend/programs.py",
}
LANGUAGE = ("sglang", "sglang.lang")


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files(package: str) -> list[Path]:
    found = sorted(PACKAGES[package].rglob("*.py"))
    assert found
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def roots(path: Path, *, top_level: bool = False) -> set[str]:
    return {module.partition(".")[0] for module in imports(path, top_level=top_level)}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows(package: str) -> None:
    """Each place uses what the table gives it, and the table gives nothing that is not used."""
    table = ARROWS[package]
    found = arrows(package)
    places = {path.stem for path in PACKAGES[package].iterdir() if path.suffix in ("", ".py")}
    assert places - BASE - OLD_NAMES - {"__init__", "__pycache__"} == table.keys()
    for place, allowed in table.items():
        uses = found.get(place, {})
        assert not uses.keys() - allowed, {name: uses[name] for name in uses.keys() - allowed}
        assert uses.keys() >= allowed, (place, allowed - uses.keys())


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package: str) -> None:
    """The table is in the order of the layers: each place uses earlier ones only."""
    earlier: set[str] = set(PACKAGES) - {package}
    for place, allowed in ARROWS[package].items():
        assert allowed <= earlier, (place, allowed - earlier)
        earlier.add(place)


def test_arrows_between_packages() -> None:
    """Others use memento_sgl, never each other."""
    for package in PACKAGES.keys() - {"memento_sgl"}:
        for place, uses in arrows(package).items():
            assert uses.keys() & PACKAGES.keys() <= {"memento_sgl"}, (package, place, uses)


def test_old_names_only_point_on() -> None:
    for name_ in OLD_NAMES - {"moved"}:
        text = (ROOT / f"memento_sgl/{name_}.py").read_text(encoding="utf-8")
        assert len(ast.parse(text).body) == 4, name_  # docstring, two imports, the warning


def test_only_the_runtime_knows_the_engine() -> None:
    for package in PACKAGES:
        for path in files(package):
            used = {module for module in imports(path) if module.startswith("sglang")}
            if name(path) in PROGRAMS:
                used = {m for m in used if m not in LANGUAGE and not m.startswith("sglang.lang.")}
            assert not used or package == "memento_patches" or name(path) in RUNTIME, name(path)


def test_the_light_frontend_needs_neither_torch_nor_sglang() -> None:
    for path in files("memento_frontend"):
        heavy = imports(path, top_level=True) & {"memento_frontend.endpoint"}
        heavy |= imports(path, top_level=True) & {"memento_frontend.programs"}
        heavy |= roots(path) & {"torch", "sglang", "transformers"}
        assert not heavy or name(path) in PROGRAMS, name(path)


def test_the_pipeline_needs_neither_torch_nor_sglang() -> None:
    heavy = {"torch", "sglang", "transformers", "safetensors", "ray"}
    for path in files("memento_pipeline"):
        assert not roots(path, top_level=True) & heavy, name(path)


def test_environment_variables_are_read_in_one_place() -> None:
    for path in files("memento_sgl") + files("memento_patches"):
        reads = "os.environ.get(" in path.read_text(encoding="utf-8")
        assert not reads or name(path) == "memento_sgl/environment.py", name(path)


def test_the_picture_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from make_structure import PAGE, with_drawing

    page = PAGE.read_text(encoding="utf-8")
    assert page == with_drawing(page), "run python docs/make_structure.py"
