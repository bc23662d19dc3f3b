"""Environment variables that matter here, read nowhere else, and the machine's devices."""

from __future__ import annotations

import os

from memento_sgl.errors import ConfigError


def check_slots() -> bool:
    """`MEMENTO_CHECK_SLOTS=1`: verify KV slot ownership after every step (slow; for tests)."""
    return _flag("MEMENTO_CHECK_SLOTS")


def secret(name: str) -> str | None:
    """The API key in the variable that the user named; None when it is unset or empty."""
    return os.environ.get(name) or None


def excluded_from_sglang() -> str | None:
    """The value of SGLang's `SGLANG_PLUGINS` if it keeps the memento plugin from loading."""
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    named = [name.strip() for name in allowed.split(",") if name.strip()]
    return allowed if named and "memento" not in named else None


def misses_forced() -> bool:
    """Whether SGLANG_RADIX_FORCE_MISS asks SGLang to throw every cache hit away."""
    return _sglang("SGLANG_RADIX_FORCE_MISS")


def served_by_rust() -> bool:
    """`SGLANG_RUST_SERVER`: requests reach schedulers without passing the Python front end."""
    return _sglang("SGLANG_RUST_SERVER")


def extensions_folder() -> str:
    """Where PyTorch builds C++ extensions."""
    return os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")


def has_accelerator() -> bool:
    """Whether PyTorch sees a device other than the CPU."""
    import torch

    return any(backend.is_available() for backend in (torch.cuda, torch.xpu, torch.backends.mps))


def share_cpu(ranks: int) -> None:
    """Let `ranks` tensor-parallel processes share this machine's cores, unless the user says how.

    SGLang binds one rank to each NUMA node and refuses more ranks than nodes; plain PyTorch binds
    nothing, so only the number of entries counts. A CUDA build of PyTorch brings NCCL, which ends
    the start without a GPU: a name that cannot be loaded leaves gloo.
    """
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([cores] * ranks))
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "no NCCL without a GPU")


def _sglang(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false")


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"
