"""The prefill policy: who may come along while another request is in the middle of its prefill."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from memento_patches.prefill import EvictingAdder, _add_first_segment, adder_class
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from memento_sgl.admission.budget import Admission
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.markers import MarkerIds


@pytest.mark.parametrize(("length", "joins"), [(8, True), (9, False), (20, False)])
def test_a_plain_prompt_joins_a_prefill_only_whole(length: int, joins: bool) -> None:
    """Two half prefilled requests at once would end the scheduler."""
    adder = SimpleNamespace(
        new_chunked_req=None, rem_chunk_tokens=10, ceil_paged_tokens=lambda n: -(-n // 4) * 4
    )
    req = SimpleNamespace(
        memento=SimpleNamespace(next_eviction=None),
        full_untruncated_fill_ids=[0] * length,
        prefix_len=0,
    )
    added = []
    outcome = _add_first_segment(lambda *args: added.append(args), adder, req, True, None)
    assert bool(added) is joins
    assert joins or outcome is AddReqResult.OTHER


@pytest.mark.parametrize("fits", [True, False])
def test_a_segment_ends_where_it_must_inside_a_page(fits: bool) -> None:
    """Upstream would cut it at a page border; it reserves as much as before."""
    adder = SimpleNamespace(
        new_chunked_req=None,
        rem_chunk_tokens=48,
        page_size=16,
        can_run_list=[],
        per_req_token_overhead=16,
        memory_budget=SimpleNamespace(total_offset=100, current_offset=50, page_size=16),
        budget_state=lambda: AddReqResult.CONTINUE,
    )
    eviction = SimpleNamespace(point=21)
    req = SimpleNamespace(
        memento=SimpleNamespace(next_eviction=eviction, row=lambda index: index),
        prefix_len=0,
        extend_len=21,
    )

    def original(req: Any, *_args: Any) -> AddReqResult:
        assert (adder.page_size, adder.rem_chunk_tokens) == (1, 21)
        assert adder.memory_budget == SimpleNamespace(
            total_offset=115, current_offset=65, page_size=1
        )
        assert adder.per_req_token_overhead == 1
        if fits:
            adder.can_run_list.append(req)
        return AddReqResult.CONTINUE if fits else AddReqResult.NO_TOKEN

    outcome = _add_first_segment(original, adder, req, False, None)
    assert outcome is (AddReqResult.CONTINUE if fits else AddReqResult.NO_TOKEN)
    assert adder.page_size == adder.per_req_token_overhead == 16
    assert adder.rem_chunk_tokens == 48 - 21 * fits
    kept = 15 * fits
    assert adder.memory_budget == SimpleNamespace(
        total_offset=100 + kept, current_offset=50 + kept, page_size=16
    )


@pytest.mark.parametrize(("holds_kv", "need"), [(False, 40 - 16 + 16), (True, 40 - 25 + 16)])
def test_the_page_in_which_a_match_ends_is_reserved(holds_kv: bool, need: int) -> None:
    """Two requests that take copies would want a page more than there is."""
    config = MementoConfig(enable=False, mask_delimiters=False, require_assistant_section=False)
    markers = MarkerIds(1, 2, 3, 4)
    ids = array("q", [5] * 40)
    req = SimpleNamespace(
        prefix_len=25,
        memento=RequestState(ids, config, markers, RequestOptions()),
        kv=SimpleNamespace(holds_kv=holds_kv),
        origin_input_ids=ids,
        output_ids=array("q"),
        to_finish=None,
        sampling_params=SimpleNamespace(max_new_tokens=1, ignore_eos=False),
    )
    estimate = Admission(config).estimate_waiting(req, 16)
    assert (estimate.need, estimate.peak_need) == (need, need)


def test_another_plugins_class_stays_below_ours() -> None:
    class Theirs(PrefillAdder):  # type: ignore[misc]
        pass

    assert adder_class(PrefillAdder, None) is EvictingAdder
    both = adder_class(Theirs, None)
    assert both is adder_class(Theirs, None)
    assert both.__mro__[1:4] == (EvictingAdder, Theirs, PrefillAdder)
