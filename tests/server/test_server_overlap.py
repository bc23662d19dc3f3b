"""Overlap scheduling on, slot ownership checked after every step."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from conftest import (
    STRICT,
    Served,
    random_jobs,
    request_body,
    spell,
    verify_lengths_around_evictions,
    verify_strict_samples,
)
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("overlap", "qwen3", "--schedule-policy", "lpm", "--chunked-prefill-size", "48")


def test_alone_and_together(server: Served) -> None:
    jobs = random_jobs(8, seed=1)
    assert server.verify_many(jobs[:3], concurrency=1) + server.verify_many(jobs, 8) > 5
    server.assert_all_slots_free()


def test_every_per_request_option_in_one_batch(server: Served) -> None:
    options = (
        {},
        {"enable": False},
        {"keep_last_n_blocks": -1},
        {"keep_last_n_blocks": 1},
        {"keep_last_block_for_answer": True},
        {"max_block_tokens": 6, "max_summary_tokens": 3},
        STRICT,
        STRICT | {"keep_last_n_blocks": -1, "min_blocks": 3},
        STRICT | {"max_blocks": 0, "min_summary_tokens": 2, "max_summary_tokens": 2},
    )
    assert server.verify_many(random_jobs(27, 2, *options, longest=260), concurrency=8) > 15


def test_every_length_around_each_eviction(server: Served) -> None:
    verify_lengths_around_evictions(server, seed=61)


def test_strict_samples_are_well_formed(server: Served) -> None:
    verify_strict_samples(server, 700, seed=70)
    server.assert_all_slots_free()


def test_strict_goes_on_where_a_prompt_stops(server: Served) -> None:
    """A program that calls once per part: any cut of a strict output gives the same rest."""
    ids = random_jobs(1, seed=71)[0][0]
    output = server.generate(ids, 90, **STRICT)["output_ids"]
    text = spell(server, output)
    assert text.count("m") == 3
    cuts = [i + 1 for i, letter in enumerate(text) if letter in "TBbMmt"]
    for cut in cuts:
        prompt = ids + output[:cut]
        options = STRICT | {"assistant_start": len(ids)}
        rest = server.generate(prompt, 90 - cut, **options)
        server.verify(prompt, rest, **options)
        assert rest["output_ids"] == output[cut:]


def test_sampling_parameters_work_with_strict(server: Served) -> None:
    """A bias cannot break the structure, but does steer what is inside; log-probabilities are
    those of the constrained distribution."""
    ids = random_jobs(1, seed=72)[0][0]
    wanted = server.tokenizer.encode("Q")[0]
    body = request_body(ids, 60, **STRICT | {"min_blocks": 3})
    body["sampling_params"] |= {"logit_bias": {str(wanted): 90.0}, "repetition_penalty": 1.1}
    answer = server.post("/generate", **body | {"return_logprob": True}).json()
    text = spell(server, answer["output_ids"])
    assert text.replace("n", "").startswith("TBxxxxxxxbMxxxxmB")
    assert answer["output_ids"].count(wanted) > 20
    reported = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    forced = [p for p, letter in zip(reported, text, strict=True) if letter in "bm"]
    assert forced == [0.0] * 6


def test_a_step_done_again_counts_once_for_penalties(server: Served) -> None:
    """SGLang's own rule under overlap scheduling, seen on requests that evict nothing: the penalty
    knows all output but the newest token, and the last prompt token."""
    import torch

    from memento_sgl.offline.reference import masked_logits

    penalty, marker = 1.7, server.markers.summary_end
    seen = 0
    for ids, _, _ in random_jobs(4, seed=73):
        body = request_body(ids, 150) | {"return_logprob": True, "token_ids_logprob": [marker]}
        body["sampling_params"]["frequency_penalty"] = penalty
        response = server.post("/generate", **body)
        assert response.status_code == 200, response.text
        answer = response.json()
        output = answer["output_ids"]
        reported = [entry[0][0] for entry in answer["meta_info"]["output_token_ids_logprobs"]]
        evictions = server.machine(ids, output).evictions
        seen += len(evictions)
        logits = masked_logits(server.model, ids + output, evictions)[len(ids) - 1 : -1]
        counted = [[], *([ids[-1], *output[:n]] for n in range(len(output) - 1))]
        for row, tokens in zip(logits, counted, strict=True):
            row -= penalty * torch.bincount(torch.tensor(tokens).long(), minlength=len(row))
        expected = logits.log_softmax(-1)[:, marker]
        assert (torch.tensor(reported) - expected).abs().max() < 0.01
    assert seen > 3


def test_strict_needs_an_assistant_turn(server: Served) -> None:
    prompt = server.tokenizer.encode("<|im_start|>user\nx<|im_end|>\n")
    response = server.post("/generate", **request_body(prompt, 4, constrain="strict"))
    assert response.status_code == 400
    assert "inside an assistant turn" in response.text
    body = request_body(prompt, 4, assistant_start=len(prompt), constrain="strict")
    body["sampling_params"]["regex"] = "ab*"
    response = server.post("/generate", **body)
    assert response.status_code == 400
    assert "contradicts constrain=strict" in response.text


def test_caps_force_the_closing_markers(server: Served) -> None:
    options = {"max_block_tokens": 4, "max_summary_tokens": 2}
    records = [
        server.generate(ids, 150, **options)["meta_info"]["memento"]
        for ids, _, _ in random_jobs(6, seed=3)
    ]
    assert max(n for record in records for n in record["block_tokens"]) == 4
    assert max(n for record in records for n in record["summary_tokens"]) == 2


def finished_block_prompts(server: Served) -> tuple[list[list[int]], int]:
    """An output cut at and around the markers of three blocks, and where the prompt ended."""
    for seed in range(11, 60):
        ids = random_jobs(1, seed=seed)[0][0]
        answer = server.generate(ids, 400)
        blocks = server.machine(ids, answer["output_ids"]).blocks
        if len(blocks) >= 4:
            break
    text = ids + answer["output_ids"]
    cuts = {m + d for b in blocks[1:4] for m in b for d in (0, 1, 2)}
    return [text[:cut] for cut in sorted(cuts)], len(ids)


def test_prompts_that_contain_finished_blocks(server: Served) -> None:
    prompts, start = finished_block_prompts(server)
    jobs = [(prompt, 40, {"assistant_start": start}) for prompt in prompts]
    assert server.verify_many(jobs, concurrency=6) > len(jobs)
    server.assert_all_slots_free()


def test_markers_of_the_prompt_count_only_in_assistant_turns(server: Served) -> None:
    encode = server.tokenizer.encode
    trap = "<|block_start|>abc<|block_end|><|summary_start|>d<|summary_end|>"
    prompt = encode(f"<|im_start|>user\n{trap}<|im_end|>\n<|im_start|>assistant\n")
    answer = server.generate(prompt, 60)
    server.verify(prompt, answer)
    spans = answer["meta_info"]["memento"]["evicted_spans"]
    assert all(start >= len(prompt) for start, _ in spans)
    answered = encode(f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{trap}e")
    answer = server.generate(answered, 60)
    assert server.verify(answered, answer) >= 1


def test_streaming_gives_the_same_tokens_and_record(server: Served) -> None:
    ids, _, _ = random_jobs(1, seed=5)[0]
    whole = server.generate(ids, 150)
    body = request_body(ids, 150) | {"stream": True}
    last: dict[str, Any] = {}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line[6:])
    assert last["output_ids"] == whole["output_ids"]
    assert server.verify(ids, last) == server.verify(ids, whole)


def test_a_session_joins_its_turns(server: Served) -> None:
    session = server.post("/open_session", capacity_of_str_len=10000).json()
    (first, _, _), (second, _, _) = random_jobs(1, seed=5)[0], random_jobs(1, seed=6)[0]
    asked = {"id": session, "rid": None}
    answer = server.post("/generate", **request_body(first, 150), session_params=asked).json()
    assert server.verify(first, answer) > 0
    asked["rid"] = answer["meta_info"]["id"]
    again = server.post("/generate", **request_body(second, 150), session_params=asked).json()
    joined = first + answer["output_ids"] + second
    assert again["meta_info"]["prompt_tokens"] == len(joined)
    server.verify(joined, again)
    server.post("/close_session", session_id=session)
    server.assert_all_slots_free()


def test_several_samples_of_one_prompt(server: Served) -> None:
    ids, _, _ = random_jobs(1, seed=6)[0]
    body = request_body(ids, 120)
    body["sampling_params"]["n"] = 4
    answers = server.post("/generate", **body).json()
    assert len(answers) == 4
    assert all(server.verify(ids, answer) == server.verify(ids, answers[0]) for answer in answers)


def test_stop_string_and_length_inside_a_block(server: Served) -> None:
    for seed in range(40, 80):
        ids = random_jobs(1, seed=seed)[0][0]
        output = server.generate(ids, 200)["output_ids"]
        blocks = server.machine(ids, output).blocks
        if blocks and blocks[0].block_tokens > 3:
            break
    inside = blocks[0].start + 2 - len(ids)
    answer = server.generate(ids, inside)
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    assert server.verify(ids, answer) == 0
    body = request_body(ids, 200)
    body["sampling_params"]["stop_token_ids"] = [server.markers.summary_end]
    body["sampling_params"]["ignore_eos"] = False
    stopped = server.post("/generate", **body).json()
    assert stopped["meta_info"]["finish_reason"]["type"] == "stop"
    assert server.verify(ids, stopped) == 0
    server.assert_all_slots_free()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep_last_n_block": 1}, "unknown option"),
        ({"keep_last_n_blocks": "1"}, "valid integer"),
        ({"keep_last_n_blocks": -2}, "greater than or equal to -1"),
        ({"keep_last_block_for_answer": True, "keep_last_n_blocks": 1}, "needs keep_last_n_blocks"),
        ({"assistant_start": 999}, "lies behind the prompt"),
        ({"restart_mode": True}, "unknown option"),
    ],
)
def test_bad_request_options_are_refused(
    server: Served, options: dict[str, Any], reason: str
) -> None:
    response = server.post("/generate", **request_body([20, 21, 22], 4, **options))
    assert response.status_code == 400
    assert reason in response.text
    chat = server.post(
        "/v1/chat/completions",
        model="m",
        messages=[{"role": "user", "content": "x"}],
        custom_params={"memento": options},
    )
    assert chat.status_code == 400
    assert server.generate([20, 21, 22], 4)["output_ids"]


def test_memento_must_be_an_object(server: Served) -> None:
    body = request_body([20, 21], 4)
    body["sampling_params"]["custom_params"] = {"memento": [1]}
    response = server.post("/generate", **body)
    assert response.status_code == 400
    assert "expected an object" in response.text


def test_calls_of_any_value_are_answered_and_harm_nobody(server: Served) -> None:
    from calls import bodies

    beside = [(ids, 400, options) for ids, _, options in random_jobs(1, seed=91)]
    seen: Counter[int] = Counter()

    @settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(body=bodies(max_new_tokens=3))
    def call(body: dict[str, Any]) -> None:
        # Not `json=`: it refuses NaN, which servers read.
        answer = httpx.post(
            f"{server.url}/generate",
            content=json.dumps(body),
            timeout=300,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code in (200, 400, 422), (answer.status_code, answer.text, body)
        seen[answer.status_code] += 1

    with ThreadPoolExecutor(1) as pool:
        meanwhile = pool.submit(server.generate_many, beside, 1)
        call()
        server.verify_all(beside, meanwhile.result())
    assert seen[200] > 5, seen
    assert seen[400] > 30, seen
    server.assert_all_slots_free()


def test_prompt_logprobs_are_refused_or_stock(server: Served) -> None:
    body = request_body([20, 21, 22], 4) | {"return_logprob": True, "logprob_start_len": 0}
    refused = server.post("/generate", **body)
    assert refused.status_code == 400
    assert "log-probabilities of prompt tokens" in refused.text
    body = request_body([20, 21, 22], 4, enable=False)
    body |= {"return_logprob": True, "logprob_start_len": 0}
    stock = server.post("/generate", **body).json()
    assert len(stock["meta_info"]["input_token_logprobs"]) == 3


def test_output_logprobs_follow_the_mask(server: Served) -> None:
    import torch

    from memento_sgl.offline.reference import masked_logits

    ids, _, _ = random_jobs(1, seed=5)[0]
    answer = server.post("/generate", **(request_body(ids, 150) | {"return_logprob": True})).json()
    output = answer["output_ids"]
    assert server.verify(ids, answer) > 0
    reported = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    evictions = server.machine(ids, output).evictions
    logits = masked_logits(server.model, ids + output, evictions).log_softmax(-1)
    exact = logits[len(ids) - 1 : -1].gather(1, torch.tensor(output)[:, None])[:, 0]
    assert len(reported) == len(output)
    assert torch.allclose(torch.tensor(reported), exact, atol=1e-3)


async def test_aborting_at_random_moments_leaks_nothing(server: Served) -> None:
    rng = random.Random(9)
    jobs = random_jobs(50, seed=9, longest=400)

    async def leave_early(client: httpx.AsyncClient, ids: list[int]) -> None:
        body = request_body(ids, 400) | {"stream": True}
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.05, 3.0)):
                async with client.stream("POST", "/generate", json=body) as response:
                    async for _ in response.aiter_lines():
                        pass

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        gate = asyncio.Semaphore(10)

        async def job(ids: list[int]) -> None:
            async with gate:
                await leave_early(client, ids)

        await asyncio.gather(*(job(ids) for ids, _, _ in jobs))
    for _ in range(100):
        if not server.loads()[0]["num_running_reqs"]:
            break
        await asyncio.sleep(0.2)
    server.assert_all_slots_free()
    assert server.verify_many(random_jobs(4, seed=10), concurrency=4) > 0
