"""More tokens than the pool holds, and more requests than SGLang would let in."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import Job, Served, random_jobs, request_body

pytestmark = pytest.mark.server

POOL = 600
CAPS = {"max_block_tokens": 40, "max_summary_tokens": 6}
LATE = {"keep_last_n_blocks": 50}  # evicts, but too late for this pool


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve(
        "steady",
        "steady",
        *("--schedule-conservativeness", "0.01"),
        pool=POOL,
        **CAPS,
    )


def jobs(server: Served, count: int, tokens: int, **options: Any) -> list[Job]:
    """Prompts behind which the model writes one block after the other."""
    return [
        ([*ids, server.markers.summary_end], tokens, options)
        for ids, _, _ in random_jobs(count, seed=71)
    ]


def most_running(server: Served, work: list[Job]) -> tuple[int, list[dict[str, Any]]]:
    """Answers to requests sent at once, and the most that were seen running together."""
    most = 0
    with ThreadPoolExecutor(1) as background:
        answers = background.submit(server.generate_many, work, len(work))
        while not answers.done():
            (load,) = server.loads()
            most = max(most, load["num_running_reqs"])
            time.sleep(0.05)
    return most, answers.result()


def wait_for_tokens(server: Served, tokens: int) -> None:
    """Until requests hold so many slots."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        (load,) = server.loads()
        if load["num_used_tokens"] >= tokens:
            return
        time.sleep(0.02)
    raise AssertionError(f"the requests never held {tokens} tokens")


def test_an_output_three_times_the_pool(server: Served) -> None:
    ((ids, tokens, _),) = jobs(server, 1, 3 * POOL)
    answer = server.generate(ids, tokens)
    assert answer["meta_info"]["completion_tokens"] == tokens
    assert server.verify(ids, answer) > 30
    server.assert_all_slots_free()


def test_a_prompt_longer_than_the_pool_whose_blocks_make_it_fit(server: Served) -> None:
    ((ids, tokens, _),) = jobs(server, 1, 2 * POOL)
    prompt = ids + server.generate(ids, tokens)["output_ids"]
    options = {"assistant_start": len(ids)}
    httpx.post(f"{server.url}/flush_cache", timeout=60)
    answer = server.generate(prompt, 50, **options)
    assert server.verify(prompt, answer, **options) > 20
    for refused, reason in ((LATE, "do not fit"), ({"enable": False}, "maximum allowed length")):
        response = server.post("/generate", **request_body(prompt, 50, **options, **refused))
        assert response.status_code == 400
        assert reason in response.text
    server.assert_all_slots_free()


def test_a_request_that_outgrows_the_pool_ends_alone(server: Served) -> None:
    others = jobs(server, 4, 200)
    big = [(others[0][0][::-1], 3 * POOL, LATE)]
    answer, *answers = server.generate_many(big + others, concurrency=5)
    reason = answer["meta_info"]["finish_reason"]
    assert reason["type"] == "abort"
    assert "out of KV memory" in reason["message"]
    assert "--max-total-tokens" in reason["message"]
    assert answer["meta_info"]["memento"].pop("error") == reason["message"]
    assert POOL - len(big[0][0]) - 2 <= len(answer["output_ids"]) <= POOL
    server.verify(big[0][0], answer, **LATE)
    assert all(len(a["output_ids"]) == 200 for a in answers)
    assert server.verify_all(others, answers) > 8
    server.assert_all_slots_free()


def test_more_requests_run_than_their_tokens_would_allow(server: Served) -> None:
    # One of these would nearly fill the pool. SGLang lets a second in only while the first is tiny.
    work = jobs(server, 10, 540, max_summary_tokens=2)
    most, answers = most_running(server, work)
    assert most >= 3
    assert server.verify_all(work, answers) > 80
    server.assert_all_slots_free()


def test_exact_when_the_forecast_is_wrong(server: Served) -> None:
    """Nobody knows where these end, and the server is told to expect next to nothing."""
    work = jobs(server, 10, 900)
    answers = server.generate_many(work, concurrency=10, ignore_eos=False)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    assert server.verify_all(work, answers) > 80
    server.assert_all_slots_free()


def test_an_urgent_request_takes_the_place_of_running_ones(
    serve: Callable[..., Served],
) -> None:
    """What was preempted goes on later, without its evicted blocks."""
    flags = ("--enable-priority-scheduling", "--max-running-requests", "3")
    server = serve("urgent", "steady", *flags, pool=POOL, **CAPS)
    work = jobs(server, 6, 500)
    ((ids, tokens, _),) = random_jobs(1, 75)
    with ThreadPoolExecutor(len(work)) as background:
        slow = [background.submit(server.generate, ids, tokens) for ids, tokens, _ in work]
        wait_for_tokens(server, POOL // 4)
        response = server.post("/generate", **request_body(ids, tokens), priority=100)
        waiting = [answer for answer in slow if not answer.done()]
        answers = [answer.result() for answer in slow]
    assert len(waiting) > 1
    urgent = response.json()
    assert urgent["meta_info"]["num_retractions"] == 0
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    server.verify(ids, urgent)
    assert server.verify_all(work, answers) > 40
    server.assert_all_slots_free()
