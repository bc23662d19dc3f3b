"""The exactness checks on an NVIDIA GPU with CUDA graphs; skipped without one.

Kernels for half precision are compared with the reference in float32, so ties are wider there.
"""

from __future__ import annotations

import dataclasses
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
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-custom-all-reduce", "--disable-prefill-cuda-graph"),
)
HALF = ("--dtype", "float16")
HALF_TIE = 0.1
OPTIONS = ({}, {"keep_last_n_blocks": 1}, {"enable": False})


def backend(server_name: str, *flags: str, half: bool = False, sm90: bool = False) -> object:
    """One server: name and flags; `sm90`: kernels that exist for Hopper only."""
    old = sm90 and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
    marks = [pytest.mark.skip(reason="needs sm90")] if old else []
    return pytest.param((server_name, flags, half), id=server_name, marks=marks)


BACKENDS = [
    backend("triton", "--attention-backend", "triton"),
    backend("triton-sync", "--attention-backend", "triton", "--disable-overlap-schedule"),
    backend("triton-pages", "--attention-backend", "triton", "--page-size", "16"),
    backend("flashinfer", "--attention-backend", "flashinfer", half=True),
    backend(
        "flashinfer-pages", "--attention-backend", "flashinfer", "--page-size", "16", half=True
    ),
    backend("fa3", "--attention-backend", "fa3", half=True, sm90=True),
    backend("fa3-pages", "--attention-backend", "fa3", "--page-size", "64", half=True, sm90=True),
    backend(
        "fa3-pages-sync",
        *("--attention-backend", "fa3", "--page-size", "64", "--disable-overlap-schedule"),
        half=True,
        sm90=True,
    ),
]


@pytest.mark.parametrize("case", BACKENDS)
def test_greedy_tokens_equal_the_oracle(
    serve: Callable[..., Served], case: tuple[str, tuple[str, ...], bool]
) -> None:
    name, flags, half = case
    family = "qwen3-head64" if half else "qwen3"
    server = serve(f"gpu-{name}", family, *FLAGS, *flags, *(HALF if half else ()))
    if half:
        server = dataclasses.replace(server, tie=HALF_TIE)
    jobs = random_jobs(24, 71, *OPTIONS)
    assert server.verify_many(jobs, concurrency=8) > 5
    assert server.verify_many(jobs, concurrency=8) > 5  # warm
    server.assert_all_slots_free()
