"""Prefix caching and eviction together: warm answers equal cold ones, and hits are as expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Served, random_jobs, request_body

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("radix", "qwen3", "--chunked-prefill-size", "64", "--enable-cache-report")


def flush(server: Served) -> None:
    for _ in range(50):
        if server.post("/flush_cache").status_code == 200:
            return
    raise AssertionError("the cache could not be flushed")


def cached(answer: dict[str, Any]) -> int:
    found: int = answer["meta_info"]["cached_tokens"]
    if found:
        assert answer["meta_info"]["cached_tokens_details"]["device"] == found
    return found


@pytest.fixture(scope="module")
def text(server: Served) -> tuple[list[int], int, list[Any]]:
    """An output with at least four finished blocks: all tokens, prompt length, the blocks."""
    for seed in range(11, 60):
        ids = random_jobs(1, seed=seed)[0][0]
        output = server.generate(ids, 400)["output_ids"]
        blocks = server.machine(ids, output).blocks
        if len(blocks) >= 4:
            return ids + output, len(ids), blocks
    raise AssertionError("no seed gives four blocks")


def test_the_same_request_twice(server: Served) -> None:
    flush(server)
    jobs = random_jobs(6, seed=101)
    cold = server.generate_many(jobs, concurrency=3)
    warm = server.generate_many(jobs, concurrency=3)
    for (ids, _, _), first, second in zip(jobs, cold, warm, strict=True):
        assert second["output_ids"] == first["output_ids"]
        assert cached(first) < len(ids) - 1
        assert cached(second) == len(ids) - 1
    assert server.verify_all(jobs, warm) > 3


def test_prefixes_of_every_length_around_each_boundary(
    server: Served, text: tuple[list[int], int, list[Any]]
) -> None:
    """Cold, right after a flush; then warm, with all kinds of prefixes in the tree."""
    tokens, start, blocks = text
    cuts = sorted({m + d for b in blocks[:3] for m in b for d in (-1, 0, 1, 2)})
    options = {"assistant_start": start}
    flush(server)
    server.generate(tokens[:-1], 8, **options)
    finished = {p for b in blocks for p in range(b.start + 1, b.end)}
    for cut in [*cuts, *reversed(cuts)]:
        answer = server.generate(tokens[:cut], 24, **options)
        server.verify(tokens[:cut], answer, **options)
        # The longest prefix whose pruned blocks are all due; an open block has to be read again.
        closed = [b for b in blocks if b.summary_end <= cut - 1]
        reusable = next((b.start + 1 for b in blocks if b not in closed), cut - 1)
        assert cached(answer) >= min(reusable, cut - 1), (cut, finished & {cut})
    server.assert_all_slots_free()


def test_one_call_per_step_reads_only_what_is_new(server: Served) -> None:
    """prompt + block + memento so far, one call a step: each reuses every surviving token."""
    flush(server)
    markers = server.markers
    figures = []
    for ids, _, _ in random_jobs(4, seed=111):
        tokens, known, start = list(ids), 0, len(ids)
        for _ in range(12):
            body = request_body(tokens, 80, assistant_start=start)
            body["sampling_params"]["ignore_eos"] = False
            body["sampling_params"]["stop_token_ids"] = [markers.block_end, markers.summary_end]
            answer = server.post("/generate", **body).json()
            server.verify(tokens, answer, assistant_start=start)
            new = len(tokens) - cached(answer)
            figures.append((len(tokens), new, len(tokens) - known))
            if known:
                assert new <= len(tokens) - known + 1
            # The last token of an answer is never read, so the next call has to.
            known = len(tokens) + len(answer["output_ids"]) - 1
            tokens += answer["output_ids"]
            tokens += [markers.summary_start] if tokens[-1] == markers.block_end else []
    total = sum(length for length, _, _ in figures)
    read = sum(new for _, new, _ in figures)
    print(f"{len(figures)} calls, {total} prompt tokens, {read} read, {total - read} reused")
    assert read < 0.4 * total


def test_samples_share_the_prompt_and_evict_their_own(server: Served) -> None:
    evictions = 0
    for seed in range(121, 160):  # nobody knows how many blocks a sample finishes
        if evictions > 3:
            break
        flush(server)
        ids = random_jobs(1, seed=seed)[0][0]
        body = request_body(ids, 200)
        body["sampling_params"] |= {"n": 6, "temperature": 1.0}
        answers = server.post("/generate", **body).json()
        assert len({tuple(answer["output_ids"]) for answer in answers}) > 1
        assert sorted(cached(answer) for answer in answers)[1:] == [len(ids) - 1] * 5
        server.assert_all_slots_free()
        # What the samples left in the tree is right: continue each of them, greedily.
        jobs = [(ids + a["output_ids"], 60, {"assistant_start": len(ids)}) for a in answers]
        warm = server.generate_many(jobs, concurrency=6)
        evictions += server.verify_all(jobs, warm)
        for (prompt, _, _), answer in zip(jobs, warm, strict=True):
            assert cached(answer) >= len(prompt) - 2
    assert evictions > 3


def test_other_options_share_up_to_the_first_eviction(
    server: Served, text: tuple[list[int], int, list[Any]]
) -> None:
    tokens, start, blocks = text
    flush(server)
    options: dict[str, Any] = {"assistant_start": start}
    server.generate(tokens[:-1], 1, **options)
    for other in ({"enable": False}, {"keep_last_n_blocks": 1}, {"keep_last_n_blocks": -1}):
        answer = server.generate(tokens[:-1], 40, **options | other)
        server.verify(tokens[:-1], answer, **options | other)
        assert cached(answer) <= blocks[0].summary_end + 1 or other != {"enable": False}
        again = server.generate(tokens[:-1], 40, **options | other)
        assert again["output_ids"] == answer["output_ids"]
        assert cached(again) == len(tokens) - 2
    back = server.generate(tokens[:-1], 40, **options)
    server.verify(tokens[:-1], back, **options)


def test_namespaces_are_respected(server: Served) -> None:
    flush(server)
    ids = random_jobs(1, seed=131)[0][0] * 2
    first = server.post("/generate", **request_body(ids, 20), extra_key="one").json()
    other = server.post("/generate", **request_body(ids, 20), extra_key="two").json()
    again = server.post("/generate", **request_body(ids, 20), extra_key="one").json()
    assert cached(first) == cached(other) == 0
    assert cached(again) == len(ids) - 1
    assert first["output_ids"] == other["output_ids"] == again["output_ids"]
