"""The prefill policy: who may come along while another request is in the middle of its prefill."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from memento_patches.prefill import around_add_one_req
from sglang.srt.managers.schedule_policy import AddReqResult


@pytest.mark.parametrize(("length", "joins"), [(8, True), (9, False), (20, False)])
def test_a_plain_prompt_joins_a_prefill_only_whole(length: int, joins: bool) -> None:
    """Two half prefilled requests at once would end the scheduler."""
    adder = SimpleNamespace(
        new_chunked_req=None, rem_chunk_tokens=10, ceil_paged_tokens=lambda n: -(-n // 4) * 4
    )
    req = SimpleNamespace(
        memento=SimpleNamespace(next_eviction=None),
        full_untruncated_fill_ids=[0] * length,
        prefix_indices=[],
    )
    added = []
    outcome = around_add_one_req(lambda *args: added.append(args), adder, req, True, None)
    assert bool(added) is joins
    assert joins or outcome is AddReqResult.OTHER
