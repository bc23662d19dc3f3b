"""Who may import whom; what the light parts may not need."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "memento_sgl": ROOT / "memento_sgl",
    "memento_patches": ROOT / "patches/memento_patches",
    "memento_frontend": ROOT / "frontend/memento_frontend",
    "memento_pipeline": ROOT / "pipeline/memento_pipeline",
}
ENTRY_POINT = "memento_sgl/cli/app.py"  # the one command line over all packages
NEEDS_PATCHES = {
    "memento_sgl/serve/arguments.py",
    "memento_sgl/cli/serve.py",
}  # function-level only
RUNTIME = {
    "memento_sgl/cpu/platform.py",
    "memento_sgl/serve/engine.py",
    "memento_sgl/cache/events.py",
    "memento_sgl/cache/paged.py",
    "memento_sgl/cache/requests.py",
    "memento_sgl/cache/tree.py",
    "memento_sgl/serve/reasoning.py",
    "memento_sgl/admission/budget.py",
    "memento_sgl/serve/arguments.py",
    "memento_sgl/engine/staging.py",
    "memento_sgl/serve/launch.py",
    "memento_sgl/serve/sglang_flags.py",
    "memento_sgl/observe/watch.py",
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


def test_arrows() -> None:
    for path in files("memento_sgl"):
        if name(path) == ENTRY_POINT:
            continue
        others = roots(path) & (PACKAGES.keys() - {"memento_sgl"})
        allowed = {"memento_patches"} if name(path) in NEEDS_PATCHES else set()
        assert others <= allowed, name(path)
        assert "memento_patches" not in roots(path, top_level=True), name(path)
    for package in ("memento_frontend", "memento_pipeline", "memento_patches"):
        for path in files(package):
            assert roots(path) & PACKAGES.keys() <= {package, "memento_sgl"}, name(path)


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
