"""What the CPU platform settles before a server starts."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from memento_sgl.cpu.platform import TorchCpuPlatform


@pytest.mark.parametrize(("tp", "dp", "ranks"), [(1, 1, 0), (2, 1, 2), (1, 2, 2), (2, 2, 4)])
def test_every_rank_has_its_entry_of_cores(
    tp: int, dp: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang refuses more ranks, data-parallel ones included, than there are entries or nodes."""
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_NCCL_SO_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    given = SimpleNamespace(tp_size=tp, dp_size=dp, max_total_tokens=100, grammar_backend=None)
    TorchCpuPlatform().apply_server_args_defaults(given)
    bound = os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "")
    assert len([cores for cores in bound.split("|") if cores]) == ranks
    assert getattr(given, "disable_custom_all_reduce", False) is (tp > 1)
    assert given.grammar_backend == "outlines"
