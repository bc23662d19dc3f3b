"""The other scheduling modes, models and options, each on a server of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    STRICT,
    Served,
    random_jobs,
    verify_lengths_around_evictions,
    verify_strict_samples,
)
from observation import observed, verify_observed

pytestmark = pytest.mark.server

CPU = ("--device", "cpu", "--attention-backend", "torch_native", "--enable-memento")
RETRACT = {"SGLANG_TEST_RETRACT": "1", "OMP_NUM_THREADS": "1"}


def sglang_launch(model: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *CPU, *flags]


def sglang_serve(model: str, *flags: str) -> list[str]:
    return [
        str(Path(sys.executable).parent / "sglang"),
        "serve",
        "--model-path",
        model,
        *CPU,
        *flags,
    ]


def retractions(answers: list[dict[str, Any]]) -> int:
    return sum(answer["meta_info"]["num_retractions"] for answer in answers)


def verify_retraction_after_evictions(server: Served, seed: int) -> None:
    """SGLang retracts the request with the shortest output. Beside a long one, that is the same one
    every three steps, before and after each of its evictions."""
    victims = [(ids, 240, options) for ids, _, options in random_jobs(4, seed)]
    beside = (random_jobs(1, seed)[0][0], 1200, {"enable": False})
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.generate_many, [beside], 1)
        while not long.done() and not server.loads()[0]["num_running_reqs"]:
            time.sleep(0.05)
        answers = server.generate_many(victims, concurrency=1)
        long.result()
    found = [
        (a["meta_info"]["num_retractions"], len(a["meta_info"]["memento"]["evicted_spans"]))
        for a in answers
    ]
    print("retractions and evictions:", found)
    assert any(retracted > 10 and evicted > 1 for retracted, evicted in found), found
    assert server.verify_all(victims, answers) > 3


def test_forced_retraction_without_overlap_and_evicted_delimiters(
    serve: Callable[..., Served],
) -> None:
    server = serve(
        "sync",
        "qwen2",
        "--disable-overlap-schedule",
        environment=RETRACT,
        launcher=sglang_launch,
        mask_delimiters=True,
    )
    options = ({}, {"keep_last_n_blocks": 1}, {"enable": False}, {"max_block_tokens": 5}, STRICT)
    assert server.verify_many(random_jobs(20, 21, *options), concurrency=8) > 5
    assert server.verify_many(random_jobs(20, 21, *options), concurrency=8) > 5  # warm
    verify_retraction_after_evictions(server, seed=26)
    verify_strict_samples(server, 150, seed=24)
    server.assert_all_slots_free()


def test_restart_mode_with_overlap_and_forced_retraction(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    server = serve(
        "restart",
        "llama",
        *observed(tmp_path),
        environment=RETRACT,
        launcher=sglang_serve,
        restart_mode=True,
        mask_delimiters=False,
    )
    jobs = random_jobs(18, 31, {}, {"enable": False}, STRICT, longest=260)
    run = verify_observed(server, tmp_path, jobs, concurrency=8)
    assert run.changed("recomputed_tokens_total") > 0
    verify_lengths_around_evictions(server, seed=61)  # several steps are done again each time
    verify_retraction_after_evictions(server, seed=33)
    verify_strict_samples(server, 150, seed=34)
    server.assert_all_slots_free()


def test_restart_mode_without_overlap_in_a_pool_too_small(serve: Callable[..., Served]) -> None:
    server = serve(
        "restart-sync", "qwen3", "--disable-overlap-schedule", pool=600, restart_mode=True
    )
    jobs = random_jobs(12, 41, longest=260)
    assert server.verify_many(jobs, concurrency=8) > 5
    server.assert_all_slots_free()


def test_overlap_in_a_pool_too_small(serve: Callable[..., Served]) -> None:
    server = serve(
        "pool",
        "qwen3",
        "--schedule-conservativeness",
        "0.01",
        pool=600,
        foresee_evictions=False,
    )
    # Two of these fill the pool, and eight are let in. With ignore_eos SGLang would reserve the
    # worst case and never retract.
    jobs = [(ids, 300, options) for ids, _, options in random_jobs(12, 51)]
    found = 0
    for _ in ("cold", "warm"):
        answers = server.generate_many(jobs, concurrency=8, ignore_eos=False)
        found += retractions(answers)
        assert server.verify_all(jobs, answers) > 5
    assert found > 0
    server.assert_all_slots_free()
    # Nothing is foreseen: the pool limits the length, as in SGLang.
    answer = server.generate(jobs[0][0], 2000)
    assert answer["meta_info"]["completion_tokens"] == 600 - len(jobs[0][0]) - 2
    server.verify(jobs[0][0], answer)
