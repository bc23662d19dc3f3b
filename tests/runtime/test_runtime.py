"""What waits in the runtime, and eviction between the segments of a prefill, step by step."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from memento_sgl.engine.eviction import evict_prefix, rows_to_next_point
from memento_sgl.engine.positions import logical_lengths
from memento_sgl.engine.runtime import Runtime
from memento_sgl.request.overrides import check_options
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.machine import Eviction
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4)
#         0  1  2  3  4  5  6  7
TOKENS = [9, 1, 8, 2, 3, 7, 4, 6]


class Request:
    """What the runtime touches of SGLang's request."""

    is_retracted = False
    rid = "r"

    def __init__(self, prompt: list[int], output: list[int], *, restart: bool, slot: int = 0):
        config = MementoConfig(
            enable=True,
            mask_delimiters=False,
            require_assistant_section=False,
            restart_mode=restart,
        )
        self.origin_input_ids, self.output_ids = array("q", prompt), array("q", output)
        self.memento = RequestState(prompt, config, MARKERS, RequestOptions())
        self.memento.observe(self.output_ids)
        self.refreshed = 0
        self.extend_end = len(prompt)
        self.kv = SimpleNamespace(
            req_pool_idx=slot,
            cache_protected_len=0,
            kv_allocated_len=0,
            kv_committed_len=0,
            holds_kv=True,
        )

    def hold(self, rows: int) -> None:
        self.prefix_len = self.already_computed = rows
        self.kv.kv_allocated_len = self.kv.kv_committed_len = rows

    def finished(self) -> bool:
        return False

    def refresh_fill_ids(self) -> None:
        self.refreshed += 1


def make_runtime() -> Runtime:
    config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
    runtime = Runtime(Settings(config, MARKERS))
    table = torch.zeros(4, 8, dtype=torch.int32)
    runtime.scheduler._scheduler = SimpleNamespace(
        future_map=SimpleNamespace(output_tokens_buf=torch.full((4,), -1)),
        result_queue=[],
        enable_overlap=False,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model_config=SimpleNamespace(vocab_size=10, context_len=100),
    )
    runtime.positions.attach(table)
    return runtime


def read_next(runtime: Runtime, *reqs: Any) -> list[int]:
    """What the next decode step reads in each slot; -1: what it would have read anyway."""
    buffer = runtime.scheduler._scheduler.future_map.output_tokens_buf.fill_(-1)
    runtime.feed_replays(SimpleNamespace(reqs=list(reqs)))
    found: list[int] = buffer.tolist()
    return found


def test_a_step_in_flight_is_ignored_and_done_again() -> None:
    runtime, other = make_runtime(), Request([9], [9], restart=False, slot=1)
    req = Request(TOKENS[:6], [], restart=False, slot=2)
    batch = SimpleNamespace(reqs=[other, req])
    runtime.scheduler._scheduler.result_queue = [(batch, None)]
    req.output_ids.append(TOKENS[6])
    runtime.observe(batch, [])
    assert (runtime.redo.due, runtime.redo.voided) == ({req}, {req: 1})
    runtime.redo.rewind(req, req.memento.apply())
    assert runtime.take_voided(SimpleNamespace(reqs=[other])) == []
    assert runtime.take_voided(batch) == [req]
    assert runtime.take_voided(batch) == []
    assert read_next(runtime, other, req) == [-1, -1, MARKERS.summary_end, -1]
    assert read_next(runtime, other, req) == [-1] * 4
    assert not runtime.redo.replaying


@pytest.mark.parametrize("prompt_len", [2, 5, 6])
def test_a_restarted_memento_is_read_again_token_by_token(prompt_len: int) -> None:
    """Its tokens come from the prompt, the output or both; only the last result counts."""
    runtime = make_runtime()
    req = Request(TOKENS[:prompt_len], TOKENS[prompt_len:7], restart=True, slot=3)
    batch = SimpleNamespace(reqs=[req])
    runtime.redo.rewind(req, req.memento.apply())
    steps = []
    for _ in range(3):
        ignored = runtime.take_voided(batch)
        steps.append((read_next(runtime, req)[3], ignored))
    assert steps == [(3, [req]), (7, [req]), (4, [])]
    assert read_next(runtime, req) == [-1] * 4


def test_forgetting_leaves_nothing_applied_nothing_waiting() -> None:
    runtime, req = make_runtime(), Request(TOKENS[:5], TOKENS[5:7], restart=True)
    runtime.redo.due.add(req)
    runtime.redo.rewind(req, req.memento.apply())
    assert req.memento.evicted
    runtime.forget(req)
    state = req.memento
    assert (state.applied, state.evicted) == (0, 0)
    assert not runtime.redo.holds(req)
    assert state.visible(list(TOKENS)) == TOKENS
    assert state.next_eviction == Eviction(6, 1, 4, 4)


@pytest.mark.parametrize(
    ("restart", "kept", "freed"),
    [(False, [10, 11, 13, 14, 15], [12]), (True, [10], [11, 12, 13, 14, 15])],
)
def test_a_prefix_loses_its_span_without_a_tree(
    restart: bool, kept: list[int], freed: list[int]
) -> None:
    runtime, req = make_runtime(), Request(TOKENS, [], restart=restart)
    table = torch.arange(10, 18).to(torch.int32)[None]
    tree = SimpleNamespace(page_size=1, req_to_token_pool=SimpleNamespace(req_to_token=table))
    req.hold(5)
    gone: list[int] = []
    allocator = SimpleNamespace(page_size=1, free=lambda slots: gone.extend(slots.tolist()))
    assert rows_to_next_point(req) == 1
    evict_prefix(runtime, req, allocator, tree)
    assert gone == []  # not before the point
    req.hold(6)
    evict_prefix(runtime, req, allocator, tree)
    assert gone == freed
    rows = len(kept)
    assert table[0, :rows].tolist() == kept
    assert req.prefix_len == rows
    assert req.kv.kv_committed_len == req.kv.kv_allocated_len == req.already_computed == rows
    assert req.refreshed == 1
    assert rows_to_next_point(req) is None


def test_the_automaton_rests_while_nobody_is_constrained() -> None:
    runtime = make_runtime()
    plain, strict = (Request([9], [9], restart=False, slot=slot) for slot in (1, 2))
    options = RequestOptions(max_block_tokens=1)
    strict.memento = RequestState([9], runtime.settings.config, MARKERS, options)

    def place(*reqs: Request) -> None:
        batch = SimpleNamespace(reqs=reqs)
        for req in reqs:
            req.cached_tokens = 0
        runtime.place(batch)

    def may_follow(slot: int, *tokens: int) -> int:
        """How many tokens may be sampled behind these."""
        assert runtime.emission.automaton is not None
        slots = torch.tensor([slot])
        for token in tokens:
            runtime.emission.automaton.advance(slots, torch.tensor([token]))
        logits = torch.zeros(1, 10)
        runtime.emission.automaton.constrain(slots, logits)
        return int((logits == 0).sum())

    place(plain)
    assert runtime.emission.automaton is None
    place(strict)
    assert may_follow(2, 9, MARKERS.block_start, 9) == 1
    assert may_follow(1, 9, MARKERS.block_start, 9) == 10
    del strict  # SGLang has forgotten it
    assert runtime.emission.automaton is None
    place(plain)
    again = Request([9], [9], restart=False, slot=1)
    again.memento = RequestState([9], runtime.settings.config, MARKERS, options)
    place(again)
    assert may_follow(1, MARKERS.block_start, 9) == 1
    assert may_follow(2, 9, MARKERS.block_start, 9) == 10  # of the slot's earlier owner
    runtime.forget(again)
    assert runtime.emission.automaton is None


def test_the_length_of_a_prompt_with_evictions_is_counted_once() -> None:
    """108 tokens are 108 whatever has left the row, in each segment."""
    req = SimpleNamespace(origin_input_ids=[0] * 108, memento=SimpleNamespace(evicted=100))
    for row_end in (4, 8):
        req.extend_end = row_end
        assert logical_lengths([req]) == [108]
    req.extend_end = 18  # retracted after ten tokens of output
    assert logical_lengths([req]) == [118]


class Arriving:
    """A request as SGLang has just made it."""

    input_embeds = session = None
    require_reasoning = False
    rid = "r"

    def __init__(self, prompt: list[int], **options: Any) -> None:
        self.origin_input_ids, self.output_ids = array("q", prompt), array("q")
        self.sampling_params = SimpleNamespace(
            custom_params={"memento": options},
            json_schema=None,
            regex=None,
            ebnf=None,
            structural_tag=None,
        )
        self.refused = ""

    def set_finish_with_abort(self, reason: str) -> None:
        self.refused, self.origin_input_ids = reason, array("q", [0])


def test_a_session_is_checked_where_its_joined_prompt_is_known() -> None:
    config = MementoConfig(enable=True, mask_delimiters=False)
    runtime = Runtime(Settings(config, MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 10)))
    strict = {"constrain": "strict"}
    turn, rest = [5, 7], [9, 9]
    for prompt, options, says in (
        ([*turn, *rest], strict, ""),
        ([*turn, *rest, 6], strict, "inside an assistant turn"),
        (turn, {"assistant_start": 3}, "behind the prompt"),
        ([*turn, *rest], {"assistant_start": 3}, ""),
        (turn, {"max_blocks": 1}, "needs constrain=strict"),
    ):
        req = Arriving(prompt, **options)
        req.session = object()  # type: ignore[assignment]
        state = runtime.new_request(req)
        assert says in req.refused, (prompt, options)
        assert bool(req.refused) == bool(says)
        assert state.prompt_len == len(req.origin_input_ids)
        # On its way in only this turn's own tokens are known.
        settings = Settings(config, runtime.settings.markers)
        if "needs" not in says:
            check_options({"memento": options}, None, settings)


def test_embeddings_hold_no_markers() -> None:
    """SGLang writes token 1 for each, which may be a marker, and starts again when retracted."""
    runtime = make_runtime()
    req = Arriving([1] * 6)
    req.input_embeds = [[0.0]] * 6  # type: ignore[assignment]
    req.memento = runtime.new_request(req)  # type: ignore[attr-defined]
    req.output_ids.extend(TOKENS[1:7])
    assert req.memento.observe(req.output_ids)  # type: ignore[attr-defined]
    pytest.importorskip("sglang")
    from memento_patches.schedule_batch import after_reset_for_retract, after_set_finish_with_abort

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memento_sgl.engine.runtime._current", runtime)
        req.output_ids = array("q")  # what SGLang does
        after_reset_for_retract(None, req)
        state: RequestState = req.memento  # type: ignore[attr-defined]
        assert (state.length, state.machine.evictions, state.machine.blocks) == (6, [], [])
        req.set_finish_with_abort("late")
        after_set_finish_with_abort(None, req)
        assert req.memento.prompt_len == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_truncated_prompt_has_a_state_of_its_length(foreseen: bool) -> None:
    pytest.importorskip("sglang")
    from memento_patches.lengths import around_validate_input_length

    runtime = make_runtime()
    runtime.admission.foresees = foreseen
    scheduler = runtime.scheduler._scheduler
    scheduler.max_req_len = scheduler.max_total_num_tokens = 100
    scheduler.max_req_input_len = 99
    req: Any = Arriving(TOKENS[1:7] * 3)
    req.memento = runtime.new_request(req)
    assert len(req.memento.machine.evictions) == 3

    def truncate(req: Any, _most: int, _allowed: bool) -> None:
        req.origin_input_ids = req.origin_input_ids[:8]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memento_sgl.engine.runtime._current", runtime)
        assert around_validate_input_length(truncate, req, 9, True) is None
    assert (req.memento.length, len(req.memento.machine.evictions)) == (8, 1)
