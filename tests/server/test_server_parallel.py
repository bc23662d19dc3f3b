"""Several processes: tensor parallel ranks, data parallel ranks, the router.

The command lines are those of docs/scale.md; Ray is in test_engine.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import CHECKS, STRICT, Served, random_jobs, request_body
from observation import observed, verify_observed
from rollouts import trainer_of
from test_server_modes import RETRACT, retractions, verify_retraction_after_evictions

from memento_sgl.observe.recorder import read_records

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"keep_last_n_blocks": 1},
    {"enable": False},
    {"keep_last_block_for_answer": True},
    {"max_block_tokens": 6, "max_summary_tokens": 3},
)


def test_tensor_parallel_ranks_evict_alike(serve: Callable[..., Served], tmp_path: Path) -> None:
    """`ownership.check_ranks` compares rows, evictions and free slots at each step."""
    flags = ("--tp", "2", "--chunked-prefill-size", "48", *observed(tmp_path))
    server = serve("tp", "qwen3", *flags, environment=RETRACT)
    jobs = random_jobs(15, 81, *OPTIONS)
    verify_observed(server, tmp_path, jobs, concurrency=8)  # each event is counted by one rank
    assert server.verify_many(jobs, concurrency=8) > 5  # warm
    verify_retraction_after_evictions(server, seed=21)
    # Sampling: every rank draws by itself, and all have to draw the same tokens.
    body = request_body(jobs[0][0], 100, **STRICT)
    body["sampling_params"] |= {"temperature": 1.0, "n": 6}
    answers = server.post("/generate", **body).json()
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1
    assert sum(len(a["meta_info"]["memento"]["evicted_spans"]) for a in answers) > 0
    # Other weights: the ranks name KV alike, `check_ranks` compares the names too.
    trainer = trainer_of(server, tmp_path / "B")
    trainer.load("B")
    trainer.generate("B", jobs[:5])
    server.assert_all_slots_free()


@pytest.fixture(scope="module")
def replicas(serve: Callable[..., Served]) -> Served:
    return serve("dp", "qwen3", "--dp-size", "2", environment=RETRACT)


def test_data_parallel_ranks(replicas: Served) -> None:
    jobs = random_jobs(20, 83, *OPTIONS)
    answers = replicas.generate_many(jobs, concurrency=8)
    assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
    assert retractions(answers) > 0
    assert replicas.verify_all(jobs, answers) > 5
    assert replicas.verify_many(jobs, concurrency=8) > 5  # warm, each on either rank
    replicas.assert_all_slots_free()


@pytest.fixture(scope="module")
def router(
    replicas: Served, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """SGLang's router in front of the data-parallel server and a second one."""
    pytest.importorskip("sglang_router", reason="pip install 'memento-sgl[router]'")
    from memento_sgl.demo.server import free_port, running_server, serve_command

    logs = tmp_path_factory.mktemp("router")
    flags = ("--dtype", "float32", "--max-total-tokens", "20000", "--log-level", "warning")
    second = serve_command(str(checkpoint("qwen3")), *flags)
    with running_server(second, logs / "second.log", environment=CHECKS, timeout=500) as other:
        launch = [sys.executable, "-m", "sglang_router.launch_router", "--policy", "round_robin"]
        launch += ["--prometheus-port", str(free_port()), "--worker-urls", replicas.url, other]
        with running_server(launch, logs / "router.log") as url:
            for _ in range(300):
                ready = httpx.get(f"{url}/readiness", timeout=5)
                if ready.status_code == 200 and ready.json()["healthy_workers"] == 2:
                    break
                time.sleep(0.2)
            yield url


@pytest.fixture(scope="module")
def routed(replicas: Served, router: str) -> Served:
    """Asks the router, verifies as usual."""
    import dataclasses

    return dataclasses.replace(replicas, url=router)


def test_the_router_spreads_requests_and_keeps_their_accounting(routed: Served) -> None:
    jobs = random_jobs(12, 85)
    answers = routed.generate_many(jobs, concurrency=6)
    ranks = {answer["meta_info"]["dp_rank"] for answer in answers}
    assert None in ranks
    assert len(ranks) > 1
    assert routed.verify_all(jobs, answers) > 5
    body = request_body(jobs[0][0], 150) | {"stream": True}
    last = list(events(f"{routed.url}/generate", body))[-1]
    assert routed.verify(jobs[0][0], last) > 0


def events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_openai_answers_keep_their_metadata_behind_the_router(
    replicas: Served, routed: Served
) -> None:
    for seed in range(87, 120):
        text = routed.tokenizer.decode(random_jobs(1, seed)[0][0])
        chat = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 300}
        chat |= {"temperature": 0, "ignore_eos": True}
        (direct,) = read_records(replicas.post("/v1/chat/completions", **chat).json()["metadata"])
        if direct["evicted_spans"]:
            break
    (record,) = read_records(routed.post("/v1/chat/completions", **chat).json()["metadata"])
    assert record["evicted_spans"]
    assert record["eviction_points"] == direct["eviction_points"]
    streamed = list(events(f"{routed.url}/v1/chat/completions", chat | {"stream": True}))
    (last,) = [read_records(e["metadata"]) for e in streamed if "metadata" in e]
    assert last[0]["evicted_spans"] == record["evicted_spans"]


def test_options_of_a_request_pass_the_router_on_completions_only(routed: Served) -> None:
    """The router drops `custom_params` on its other routes: docs/scale.md says so."""
    asked = {"model": "m", "prompt": "abc", "max_tokens": 200, "temperature": 0, "ignore_eos": True}

    def completion(**options: Any) -> httpx.Response:
        return routed.post("/v1/completions", **asked, custom_params={"memento": options})

    (record,) = read_records(completion(max_block_tokens=4).json()["metadata"])
    assert max(record["block_tokens"]) == 4
    refused = completion(max_block_token=4)
    assert refused.status_code == 400
    assert "unknown option" in refused.text
    body = request_body([20, 21, 22], 4, max_block_token=4)
    assert routed.post("/generate", **body).status_code == 200
