"""Kinds of attention on torch_native, each on a server of its own: the table of docs/models.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Served, random_jobs
from test_server_modes import RETRACT
from test_server_overlap import finished_block_prompts

pytestmark = [pytest.mark.server, pytest.mark.external, pytest.mark.timeout(1200)]
OPTIONS = (
    {},
    {"enable": False},
    {"keep_last_n_blocks": 1},
    {"max_block_tokens": 6, "max_summary_tokens": 3},
)


@pytest.mark.parametrize("shape", ["phi3", "llama3", "moe"])
def test_a_layout_equals_the_oracle(serve: Callable[..., Served], shape: str) -> None:
    server = serve(
        f"layout-{shape}",
        shape,
        *("--chunked-prefill-size", "48"),
        environment=RETRACT | {"SGLANG_TEST_RETRACT_INTERVAL": "16"},
        mask_delimiters=shape == "phi3",
    )
    jobs = random_jobs(12, 111, *OPTIONS, longest=160)
    assert server.verify_many(jobs, concurrency=6) > 5
    prompts, start = finished_block_prompts(server)
    behind = [(prompt, 20, {"assistant_start": start}) for prompt in prompts[::6]]
    assert server.verify_many(behind, concurrency=4) >= len(behind)
    server.assert_all_slots_free()
    assert "has not been checked" not in server.log.read_text()
