"""Page sizes above 1: exactness and ownership on real servers, prefix caching included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Served, random_jobs
from observation import observed, verify_observed
from test_server_modes import RETRACT, verify_retraction_after_evictions
from test_server_overlap import finished_block_prompts

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]
CHUNKS = ("--chunked-prefill-size", "48")
OPTIONS = (
    {},
    {"enable": False},
    {"keep_last_n_blocks": 1},
    {"keep_last_block_for_answer": True},
    {"max_block_tokens": 6, "max_summary_tokens": 3},
)


def verify_prompts_with_finished_blocks(server: Served) -> None:
    """Segments end inside pages; plain prompts longer than a chunk wait for their turn."""
    prompts, start = finished_block_prompts(server)
    jobs = [(prompt, 30, {"assistant_start": start}) for prompt in prompts[::3]]
    plain = [(ids + prompts[-1], 5, {"enable": False}) for ids, _, _ in random_jobs(6, 93)]
    mixed = [job for pair in zip(jobs, plain, strict=False) for job in pair]
    for ignore_eos in (True, False):  # two policies of admission
        answers = server.generate_many(mixed, concurrency=8, ignore_eos=ignore_eos)
        assert server.verify_all(mixed, answers) > len(jobs)


def verify_prefixes_are_shared(server: Served) -> None:
    """A call that goes on with all that was said before computes less than a page of it again."""
    ((ids, _, options), *_) = random_jobs(1, 92, {})
    first = server.generate_many([(ids, 60, options)], concurrency=1, ignore_eos=True)
    server.verify_all([(ids, 60, options)], first)
    longer = ids + first[0]["output_ids"]
    jobs = [([*longer, token], 20, options) for token in ids[:4]]
    answers = server.generate_many(jobs, concurrency=4, ignore_eos=True)
    server.verify_all(jobs, answers)
    assert all(a["meta_info"]["cached_tokens"] > 0 for a in answers)


def verify_a_prompt_that_never_fits_ends(server: Served) -> None:
    """It fits the pool by tokens, but not with the page that each request gets on top. Those behind
    it are served."""
    ((ids, _, _), *others) = random_jobs(5, 97)
    too_long = ((ids * 200)[:795], 2, {"enable": True})
    answer, *answers = server.generate_many([too_long, *others], concurrency=5)
    reason = answer["meta_info"]["finish_reason"]
    assert reason["type"] == "abort"
    assert "do not fit" in reason["message"]
    assert answer["output_ids"] == []
    server.verify_all(others, answers)


def test_pages_with_overlap_and_forced_retraction(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    # A row is read again in several segments. Where these fill the interval, the request is
    # retracted before the token of its prefill is known, and for ever.
    rarely = RETRACT | {"SGLANG_TEST_RETRACT_INTERVAL": "16"}
    flags = ("--page-size", "4", *CHUNKS, *observed(tmp_path))
    server = serve("pages", "qwen3", *flags, environment=rarely)
    verify_prefixes_are_shared(server)
    run = verify_observed(server, tmp_path, random_jobs(15, 91, *OPTIONS), concurrency=8)
    assert run.changed("voided_steps_total") > 0
    verify_prompts_with_finished_blocks(server)
    verify_retraction_after_evictions(server, seed=21)
    server.assert_all_slots_free()


@pytest.mark.parametrize("restart", [False, True], ids=["evict", "restart"])
def test_pages_without_overlap_in_a_pool_too_small(
    serve: Callable[..., Served], restart: bool
) -> None:
    """Evicted delimiters; in restart mode the memento is read again into the pages of its block."""
    server = serve(
        f"pages-sync-{restart}",
        "llama",
        *("--page-size", "16", "--disable-overlap-schedule", *CHUNKS),
        pool=800,
        restart_mode=restart,
        mask_delimiters=True,
    )
    jobs = random_jobs(12, 95, longest=260)
    assert server.verify_many(jobs, concurrency=8) > 5
    answers = server.generate_many(jobs, concurrency=8, ignore_eos=False)
    assert server.verify_all(jobs, answers) > 5
    verify_a_prompt_that_never_fits_ends(server)
    server.assert_all_slots_free()
