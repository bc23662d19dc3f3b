"""What is done around a decode step, and what an answer takes along, on stand-ins."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from memento_patches.output import RecordingStreamer, streamer_class
from memento_patches.penalties import COUNTS, around_cumulate
from memento_patches.scheduler import around_decode, between_segments, not_voided
from memento_patches.tokenizer_manager import add_record
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator

from memento_sgl.admission.pacing import SEGMENTS
from memento_sgl.engine import runtime
from memento_sgl.request.settings import Settings
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4)
PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> runtime.Runtime:
    config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
    state = runtime.Runtime(Settings(config, MARKERS))
    monkeypatch.setattr(runtime, "_current", state)
    return state


class Req:
    """SGLang's requests are hashed by identity."""


class Batch:
    """Two requests with every penalty, whose newest token is 5."""

    device = "cpu"

    def __init__(self) -> None:
        values = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5}
        params = SimpleNamespace(**values, min_new_tokens=9, stop_token_ids=set())
        tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)
        self.reqs = [Req() for _ in range(2)]
        for req in self.reqs:
            req.sampling_params, req.tokenizer, req.eos_token_ids = params, tokenizer, None
        orchestrator = BatchedPenalizerOrchestrator(8, self, set(COUNTS))
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=orchestrator)

    def cumulate(self) -> None:
        self.sampling_info.penalizer_orchestrator.cumulate_output_tokens(torch.tensor([5, 5]))

    def counted(self, row: int) -> list[float]:
        """What the penalties of a request add up to, each on its own."""
        penalizers = self.sampling_info.penalizer_orchestrator.penalizers
        assert all(penalizer.is_prepared() for penalizer in penalizers.values())
        return [float(getattr(penalizers[kind], name)[row].sum()) for kind, name in COUNTS.items()]


def test_a_step_that_is_done_again_counts_for_no_penalty(state: runtime.Runtime) -> None:
    batch = Batch()
    start = batch.counted(0)
    state.redo.reread.add(batch.reqs[0])
    around_cumulate(Batch.cumulate, batch)
    assert batch.counted(0) == start
    once = batch.counted(1)
    assert all(now != then for now, then in zip(once, start, strict=True))
    state.redo.reread.clear()
    around_cumulate(Batch.cumulate, batch)
    assert batch.counted(0) == once


def test_a_step_that_was_put_off_is_still_done_again(state: runtime.Runtime) -> None:
    """SGLang may skip one decode step, behind what was fed for it."""
    state.redo.reread.add("r")
    assert around_decode(lambda scheduler, batch: None, None, "batch") is None
    assert state.redo.reread == {"r"}
    assert around_decode(lambda scheduler, batch: batch, None, "batch") == "batch"
    assert not state.redo.reread


def test_a_step_that_was_put_off_reads_the_same_tokens(state: runtime.Runtime) -> None:
    """The row would lack one of them, and all behind it stand one row too early."""
    tokens = torch.zeros(4, dtype=torch.int64)
    state.scheduler._scheduler = SimpleNamespace(
        enable_overlap=True,
        forward_stream_ctx=nullcontext(),
        future_map=SimpleNamespace(output_tokens_buf=tokens),
    )
    req = Req()
    req.kv, req.finished = SimpleNamespace(req_pool_idx=2), lambda: False
    req.origin_input_ids, req.output_ids = [5, 6], [7, 8, 9]
    req.memento = SimpleNamespace(prompt_len=2, length=5)
    state.redo.replaying[req] = 3
    batch, read = SimpleNamespace(reqs=[req]), []
    for skipped in (True, False, True, True, False, False):
        around_decode(lambda scheduler, batch, skip=skipped: None if skip else batch, None, batch)
        if not skipped:
            read.append(int(tokens[2]))
    assert read == [8, 9, 9]  # the last step reads what sampling would have put there
    assert not state.redo.replaying


@pytest.mark.parametrize("fits", [True, False])
def test_no_decode_step_between_segments_without_memory(state: runtime.Runtime, fits: bool) -> None:
    memento = SimpleNamespace(next_eviction="one")
    scheduler = SimpleNamespace(chunked_req=SimpleNamespace(memento=memento))
    running = SimpleNamespace(
        is_empty=lambda: False, is_prefill_only=False, check_decode_mem=lambda: fits
    )
    steps = [between_segments(False, scheduler, running) for _ in range(SEGMENTS + 1)]
    assert steps == [False] * SEGMENTS + [fits]
    assert between_segments(True, scheduler, running)


def test_a_void_step_does_not_finish_its_request(state: runtime.Runtime) -> None:
    assert not_voided(["a", "b"], None, None) is None
    state.redo.voided["a"] = 1
    assert not_voided(["a", "b"], None, None) == ["b"]


def request(record: dict[str, Any] | None, *, finished: bool) -> Any:
    return SimpleNamespace(
        finished=lambda: finished,
        output_ids_through_stop=[1],
        memento=SimpleNamespace(
            config=SimpleNamespace(enable=record is not None),
            report=lambda output: record,
            watch=None,
        ),
    )


def test_only_messages_with_a_finished_request_carry_accounting() -> None:
    streamer = RecordingStreamer.__new__(RecordingStreamer)
    running, off = request({"x": 1}, finished=False), request(None, finished=True)
    assert streamer.build_additional_customized_info([running, off]) == {}
    ended = request({"x": 1}, finished=True)
    info = streamer.build_additional_customized_info([running, ended, off])
    assert info == {"memento": [[], [{"x": 1}], []]}
    assert streamer_class(SchedulerOutputStreamer, None) is RecordingStreamer


def test_the_accounting_is_one_value_beside_what_other_plugins_gather() -> None:
    given = {"memento": [[], [{"x": 1}]], "theirs": [[1], [2]]}
    for index, record in enumerate((None, {"x": 1})):
        meta: dict[str, Any] = {}
        seen: list[Any] = []
        add_record(lambda *args, seen=seen: seen.append(args), "m", meta, "s", given, index, None)
        assert meta.get("memento") == record
        assert seen == [("m", meta, "s", {"theirs": [[1], [2]]}, index, None)]
