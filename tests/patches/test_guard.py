"""The plugin fails closed. Patching cannot be undone in a process: each case has its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types

import pytest

pytest.importorskip("sglang")

from memento_patches.guard import fingerprint, load_hook, problems, resolve, unapplied
from memento_patches.ledger import LEDGER, RELIED, Relied, Seam, seams


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_ledger_is_complete_and_true() -> None:
    entries = (*LEDGER, *RELIED)
    assert problems(entries) == []
    assert len({entry.target for entry in entries}) == len(entries)
    for seam in LEDGER:
        assert seam.why
        assert seam.retire
        assert callable(load_hook(seam))
    assert all(relied.what for relied in RELIED)


def test_every_hook_function_is_in_the_ledger() -> None:
    import importlib
    import inspect
    import pkgutil

    import memento_patches

    listed = {seam.hook for seam in LEDGER}
    internal = {"ledger", "guard", "plugin", "classes", "overridden", "compare", "source"}
    for info in pkgutil.iter_modules(memento_patches.__path__):
        if info.name in internal:
            continue
        module = importlib.import_module(f"memento_patches.{info.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and inspect.isfunction(value) and not name.startswith("_"):
                assert f"{info.name}:{name}" in listed, f"{info.name}:{name} wraps nothing"


def test_a_missing_and_a_changed_target_are_named() -> None:
    gone = Seam("sglang.srt.server_args.Nothing.x", "AFTER", "output:streamer_class",
                "bootstrap", "w", "r", "0" * 16)  # fmt: skip
    changed = Seam(
        LEDGER[0].target, "AFTER", "output:streamer_class", "bootstrap", "w", "r", "0" * 16
    )
    relied = Relied(RELIED[0].target, "w", "0" * 16)
    lines = problems([gone, changed, relied])
    assert "sglang.srt.server_args.Nothing.x does not exist" in lines[0]
    assert f"{LEDGER[0].target} has changed" in lines[1]
    assert f"{RELIED[0].target} has changed" in lines[2]
    assert fingerprint(LEDGER[0].target) == LEDGER[0].fingerprint


def test_a_miss_ends_the_process() -> None:
    done = run(
        """
        import dataclasses, memento_patches.ledger as ledger
        first = dataclasses.replace(ledger.LEDGER[0], fingerprint="0" * 16)
        ledger.LEDGER = (first, *ledger.LEDGER[1:])
        from sglang.srt.plugins import load_plugins
        load_plugins()
        print("served")
        """
    )
    assert done.returncode != 0
    assert "served" not in done.stdout
    assert "refusing to serve: " + LEDGER[0].target in done.stderr


def test_another_sglang_version_ends_the_process() -> None:
    done = run(
        """
        import memento_patches.guard as guard
        guard.SGLANG_VERSION = "0.5.16"
        from sglang.srt.plugins import load_plugins
        load_plugins()
        print("served")
        """
    )
    assert done.returncode != 0
    assert "pip install sglang==0.5.16" in done.stderr


def test_without_the_flag_only_the_flags_are_patched() -> None:
    done = run(
        """
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from memento_patches.guard import carries, load_hook
        from memento_patches.ledger import LEDGER
        for seam in LEDGER:
            assert carries(seam.target, load_hook(seam)) == (seam.role == "bootstrap"), seam.target
        """
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_hook_that_was_not_applied_is_found() -> None:
    done = run(
        """
        from sglang.srt.plugins.hook_registry import HookRegistry
        HookRegistry._apply_target = classmethod(lambda cls, target, hooks: None)
        from sglang.srt.plugins import load_plugins
        load_plugins()
        print("served")
        """
    )
    assert done.returncode != 0
    assert "is not wrapped" in done.stderr


def test_an_original_bound_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that imported the function before it was wrapped would go on calling it."""
    target = LEDGER[0].target
    module = types.ModuleType("imported_early")
    vars(module)["mine"] = resolve(target)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = unapplied({target: resolve(target)}, {})
    assert found == [f"{target} is still bound unpatched as imported_early.mine"]


def test_roles() -> None:
    assert {seam.role for seam in LEDGER} == {"bootstrap", "frontend", "page", "scheduler"}
    assert len(seams("scheduler")) > 5
