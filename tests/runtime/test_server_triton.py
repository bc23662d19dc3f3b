"""SGLang's Triton attention backend on a CPU: its own kernels, in Triton's interpreter.

Everything of that backend but the compiled kernels runs: which rows they are told to read, and what
they make of them, in float32. (In bfloat16 the interpreter's `dot` is wrong.) Its time is the
number of programs, so the model is tiny and the answers are short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import STRICT, Job, Served, random_jobs, request_body
from test_server_modes import RETRACT, retractions

pytest.importorskip("triton", reason="comes with torch on Linux")

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]
# Two splits: rows behind the first 32 are read by another program than those before.
FLAGS = (
    *("--attention-backend", "triton", "--triton-attention-num-kv-splits", "2"),
    *("--chunked-prefill-size", "48"),
)
ENVIRONMENT = RETRACT | {"SGLANG_TEST_RETRACT_INTERVAL": "16", "TRITON_INTERPRET": "1"}
BLOCKS = {"max_block_tokens": 6, "max_summary_tokens": 3}
OPTIONS = ({}, BLOCKS, {"keep_last_n_blocks": 1})


def verify_together(server: Served, jobs: list[Job]) -> list[dict[str, Any]]:
    """Jobs at once, with evictions and retractions among them; their answers."""
    answers = server.generate_many(jobs, concurrency=4)
    assert server.verify_all(jobs, answers) > 3
    assert retractions(answers) > 0
    return answers


def verify_behind_blocks(
    server: Served, jobs: list[Job], answers: list[dict[str, Any]], *, cached: bool = True
) -> None:
    """Prompts that end behind each finished block of an answer, and one token later: read in
    segments, or taken from the cache."""
    points: list[int] = []
    for (ids, _, options), answer in zip(jobs, answers, strict=True):
        found = [e.point for e in server.machine(ids, answer["output_ids"], **options).evictions]
        if len(found) > len(points):
            points, text = found, ids + answer["output_ids"]
            asked = options | {"assistant_start": len(ids)}
    behind: list[Job] = [(text[: point + more], 6, asked) for point in points for more in (1, 2)]
    again = server.generate_many(behind, concurrency=4)
    assert server.verify_all(behind, again) >= len(behind)
    assert any(answer["meta_info"]["cached_tokens"] for answer in again) == cached


@pytest.mark.parametrize("page", ["1", pytest.param("16", marks=pytest.mark.external)])
def test_interpreted_kernels_see_what_is_visible(serve: Callable[..., Served], page: str) -> None:
    flags = (*FLAGS, "--page-size", page)
    server = serve(f"triton-{page}", "tiny", *flags, pool=800, environment=ENVIRONMENT)
    jobs = random_jobs(4, 1, *OPTIONS, longest=70)
    verify_behind_blocks(server, jobs, verify_together(server, jobs))
    server.assert_all_slots_free()
    assert "attention backend triton has not been checked" not in server.log.read_text()


@pytest.mark.external
@pytest.mark.parametrize(
    ("name", "flags", "restart"),
    [
        ("overlap", ("--page-size", "1"), False),
        ("pages", ("--page-size", "16"), False),
        ("sync", ("--page-size", "16", "--disable-overlap-schedule"), False),
        ("restart", ("--page-size", "1"), True),
        ("restart-sync", ("--page-size", "16", "--disable-overlap-schedule"), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_interpreted(
    serve: Callable[..., Served], name: str, flags: tuple[str, ...], restart: bool
) -> None:
    server = serve(
        f"triton-long-{name}",
        "qwen3",
        *FLAGS,
        *flags,
        pool=1600,
        environment=ENVIRONMENT,
        restart_mode=restart,
    )
    options = (*OPTIONS, {"enable": False}, {"keep_last_block_for_answer": True}, STRICT)
    jobs = random_jobs(12, 3, *options, longest=140)
    verify_behind_blocks(server, jobs, verify_together(server, jobs), cached=not restart)
    body = request_body(jobs[0][0], 60, **BLOCKS)
    body["sampling_params"]["n"] = 3
    answers = server.post("/generate", **body).json()
    assert len(answers) == 3
    assert all(server.verify(jobs[0][0], answer, **BLOCKS) > 0 for answer in answers)
    server.assert_all_slots_free()
