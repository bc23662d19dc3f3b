"""The exactness checks on an NVIDIA GPU with CUDA graphs; skipped without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Served, random_jobs

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.server,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FLAGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-custom-all-reduce", "--disable-prefill-cuda-graph"),
)


@pytest.mark.parametrize("overlap", [(), ("--disable-overlap-schedule",)], ids=["overlap", "sync"])
def test_greedy_tokens_equal_the_oracle(
    serve: Callable[..., Served], overlap: tuple[str, ...]
) -> None:
    server = serve(f"gpu{len(overlap)}", "qwen3", *FLAGS, *overlap)
    options = ({}, {"keep_last_n_blocks": 1}, {"enable": False})
    jobs = random_jobs(24, 71, *options)
    assert server.verify_many(jobs, concurrency=8) > 5
    assert server.verify_many(jobs, concurrency=8) > 5  # warm
    server.assert_all_slots_free()
