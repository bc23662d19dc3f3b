"""Flags of SGLang that change when and in what order things run: many of them on one server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import STRICT, Served, random_jobs, request_body

pytestmark = pytest.mark.server

FLAGS = (
    *("--schedule-policy", "lof"),
    *("--enable-priority-scheduling", "--schedule-low-priority-values-first"),
    *("--priority-scheduling-preemption-threshold", "1", "--default-priority-value", "3"),
    *("--retraction-policy", "priority", "--radix-eviction-policy", "slru"),
    *("--max-prefill-tokens", "128", "--chunked-prefill-size", "64"),
    *("--prefill-max-requests", "3", "--prefill-decode-interval", "2"),
    *("--prefill-decode-interval-min-bs", "2", "--scheduler-recv-interval", "3"),
    *("--num-continuous-decode-steps", "2", "--schedule-conservativeness", "0.05"),
    *("--max-running-requests", "6", "--max-queued-requests", "64"),
    *("--stream-interval", "3", "--batch-notify-size", "2"),
    *("--enable-custom-logit-processor", "--allow-auto-truncate"),
    *("--preferred-sampling-params", '{"min_p": 0.0}'),
)


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("flags", "qwen3", *FLAGS, pool=700, foresee_evictions=False)


def test_order_and_rhythm_of_steps_change_no_token(server: Served) -> None:
    options = ({}, {"keep_last_n_blocks": 1}, {"max_block_tokens": 5}, STRICT, {"enable": False})
    jobs = random_jobs(15, 301, *options, longest=240)
    for _ in ("cold", "warm"):

        def call(numbered: tuple[int, Any]) -> dict[str, Any]:
            number, (ids, tokens, chosen) = numbered
            body = request_body(ids, tokens, **chosen) | {"priority": number % 4}
            response = server.post("/generate", **body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(call, enumerate(jobs)))
        assert server.verify_all(jobs, answers) > 5
    server.assert_all_slots_free()


def test_a_truncated_prompt_is_the_prompt(server: Served) -> None:
    """The state of a request follows its prompt, also where nothing is foreseen."""
    markers = server.markers
    block = [markers.block_start, 30, 31, 32, markers.block_end, markers.summary_start, 33]
    turn = [markers.im_start, markers.assistant]
    long = turn + [*block, markers.summary_end, 34, 35] * 90
    for options in ({}, {"keep_last_n_blocks": 1}):
        answer = server.generate(long, 8, **options)
        used = answer["meta_info"]["prompt_tokens"]
        assert used < len(long)
        server.verify(long[:used], answer, **options)
    server.assert_all_slots_free()


def test_a_custom_logit_processor_bans_what_a_bias_bans(server: Served) -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    banned = list(range(20, 60))
    ids = random_jobs(1, 303)[0][0]
    biased = request_body(ids, 60)
    biased["sampling_params"]["logit_bias"] = dict.fromkeys(map(str, banned), -1e9)
    processed = request_body(ids, 60)
    processed["sampling_params"]["custom_params"]["token_ids"] = banned
    processed["custom_logit_processor"] = DisallowedTokensLogitsProcessor().to_str()
    answers = [server.post("/generate", **body).json() for body in (biased, processed)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert not set(answers[0]["output_ids"]) & set(banned)
    refused = server.post("/generate", **processed | {"custom_logit_processor": "x"})
    assert refused.status_code == 400
    assert "custom_logit_processor cannot be read" in refused.text
