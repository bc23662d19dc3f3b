"""Environment variables that matter here, read nowhere else, and the machine's devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memento_sgl.errors import ConfigError

# NVIDIA, the same under WSL, AMD, Intel. Accelerators of other makers have plugins of their own.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/dev/dri")


def check_slots() -> bool:
    """`MEMENTO_CHECK_SLOTS=1`: verify KV slot ownership after every step (slow; for tests)."""
    return _flag("MEMENTO_CHECK_SLOTS")


def secret(name: str) -> str | None:
    """The API key in the variable that the user named; None when it is unset or empty."""
    return os.environ.get(name) or None


def base_url() -> str | None:
    """`MEMENTO_BASE_URL`: the server that commands ask; None when it is unset or empty."""
    return os.environ.get("MEMENTO_BASE_URL") or None


def config_path() -> tuple[Path | None, Path]:
    """The configuration file that `MEMENTO_CONFIG` names, if any, and the one used otherwise."""
    named = os.environ.get("MEMENTO_CONFIG")
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(named) if named else None, Path(folder) / "memento" / "config.toml"


def hub_is_offline() -> bool:
    """Whether Hugging Face's libraries are told not to use the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def other_hub() -> bool:
    """Whether SGLang fetches checkpoints from ModelScope instead of Hugging Face."""
    return os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true")


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


def triton_interpreted() -> bool:
    """TRITON_INTERPRET: Triton's kernels run in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def extensions_folder() -> str:
    """Where PyTorch builds C++ extensions."""
    return os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")


def has_accelerator() -> bool:
    """Whether PyTorch sees a device other than the CPU. Not asked where there cannot be one: its
    import takes seconds."""
    if sys.platform == "linux" and not any(Path(name).exists() for name in DEVICE_FILES):
        return False
    import torch

    return any(backend.is_available() for backend in (torch.cuda, torch.xpu, torch.backends.mps))


def share_cpu(ranks: int) -> None:
    """Let `ranks` scheduler processes share this machine's cores, unless the user says how.

    SGLang binds one rank to each NUMA node and refuses more ranks than nodes; plain PyTorch binds
    nothing, so only the number of entries counts. A CUDA build of PyTorch brings NCCL, which ends
    the start without a GPU: a name that cannot be loaded leaves gloo.
    """
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([cores] * ranks))
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "no NCCL without a GPU")


def _sglang(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false")


@contextmanager
def warnings_of_children(rule: str) -> Iterator[None]:
    """Add a rule of `python -W` for the Python programs that are started meanwhile."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{rule}" if before else rule
    try:
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"
