"""Apply seams of SGLang and fail closed: nothing is served by an engine that is half patched.

SGLang itself logs and goes on when a plugin or hook fails. So everything is checked before, and
again after, and any miss ends the process with one message.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from memento_patches.ledger import SGLANG_VERSION, Relied, Seam
from memento_sgl.errors import PatchError


def fingerprint(target: str) -> str:
    """First 16 hex digits of the SHA-256 of the target's source, indentation removed.

    Raises:
        PatchError: the target does not exist.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(resolve(target))))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def resolve(target: str) -> Callable[..., Any]:
    """The function behind a dotted name, out of its classmethod or staticmethod."""
    owner_name, _, name = target.rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_name)
        found = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise PatchError(f"{target} does not exist ({error!r})") from None
    function: Callable[..., Any] = getattr(found, "__func__", found)
    return function


def check_version() -> None:
    """Raises PatchError unless the one supported SGLang is installed."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise PatchError("SGLang is not installed: pip install 'memento-sgl[serve]'") from None
    if found != SGLANG_VERSION:
        raise PatchError(
            f"SGLang {found} is installed, but this release patches {SGLANG_VERSION} only: "
            f"pip install sglang=={SGLANG_VERSION}"
        )


def problems(entries: Iterable[Seam | Relied]) -> list[str]:
    """What is wrong with the targets before patching; empty if all are as expected."""
    found = []
    for seam in entries:
        try:
            now = fingerprint(seam.target)
        except (PatchError, OSError) as error:
            found.append(str(error))
            continue
        if now != seam.fingerprint:
            found.append(
                f"{seam.target} has changed (fingerprint {now}, expected {seam.fingerprint})"
            )
    return found


def apply(seams: Iterable[Seam], relied: Iterable[Relied] = ()) -> None:
    """Check, wrap and verify.

    The registry's own `apply_hooks` logs failures and skips a target that any plugin has wrapped
    before, so each hook is put around whatever is there now, which keeps other plugins' hooks.

    Raises:
        PatchError: naming every target that is missing, changed or not wrapped.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    check_version()
    seams = list(seams)
    if wrong := problems([*seams, *relied]):
        raise PatchError(_message(wrong))
    hooks = {seam.target: load_hook(seam) for seam in seams}
    originals = {target: resolve(target) for target in hooks}
    for seam in seams:
        hook = hooks[seam.target]
        HookRegistry._apply_target(seam.target, [(HookType[seam.kind], hook, None)])
    if wrong := unapplied(originals, hooks):
        raise PatchError(_message(wrong))


def unapplied(
    originals: dict[str, Callable[..., Any]], hooks: dict[str, Callable[..., Any]]
) -> list[str]:
    """Targets that do not carry their hook, or are bound somewhere as their original function."""
    found = [
        f"{target} is not wrapped" for target, hook in hooks.items() if not carries(target, hook)
    ]
    by_id = {id(function): target for target, function in originals.items()}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if (target := by_id.get(id(value))) is not None and value is originals[target]:
                found.append(f"{target} is still bound unpatched as {name}.{attribute}")
    return found


def carries(target: str, hook: Callable[..., Any]) -> bool:
    """Whether some wrapper around the target calls the hook."""
    function: Any = resolve(target)
    while function is not None:
        if any(cell.cell_contents is hook for cell in function.__closure__ or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def load_hook(seam: Seam) -> Callable[..., Any]:
    """The hook function of a seam."""
    module, _, name = seam.hook.partition(":")
    hook: Callable[..., Any] = getattr(importlib.import_module(f"memento_patches.{module}"), name)
    return hook


def _message(wrong: list[str]) -> str:
    return f"memento cannot patch SGLang {SGLANG_VERSION}, refusing to serve: " + "; ".join(wrong)
