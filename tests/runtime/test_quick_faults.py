"""Small faults that only a running server would show otherwise: one line each, in milliseconds."""

from __future__ import annotations

import logging
import queue
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from memento_patches.forward import after_init_new
from test_runtime import MARKERS, TOKENS, Request, make_runtime

from memento_sgl.engine.runtime import Runtime
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.accounting import account, kv_curve
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.machine import replay
from memento_sgl.serve.radix import saying_what_it_waits_for

BLOCK = [1, 8, 8, 2, 3, 7, 4]  # two tokens in the block, one in its memento


@pytest.mark.parametrize("extend", [True, False])
def test_positions_move_by_what_was_evicted(extend: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = make_runtime()
    monkeypatch.setattr("memento_sgl.engine.runtime._current", runtime)

    def positions() -> list[int]:
        batch: Any = SimpleNamespace(
            req_pool_indices=torch.tensor([2, 1]),
            forward_mode=SimpleNamespace(is_extend=lambda: extend),
            extend_seq_lens=torch.tensor([3, 1]),
            extend_num_tokens=4,
            positions=torch.arange(4 if extend else 2),
        )
        after_init_new(batch)
        moved: list[int] = batch.positions.tolist()
        return moved

    assert positions() == list(range(4 if extend else 2))
    runtime.positions.set([1, 2], [10, 20])
    assert positions() == ([20, 21, 22, 13] if extend else [20, 11])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 0, 0, 0]),
        ({"keep_last_n_blocks": 2}, [2, 1, 0, 0]),
        ({"keep_last_block_for_answer": True}, [1, 0, 0, 0]),
    ],
)
def test_blocks_seen_are_not_kept_once_more(options: dict[str, Any], kept: list[int]) -> None:
    config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
    parsed = RequestOptions.parse(options)
    found = [
        RequestState(BLOCK * blocks, config, MARKERS, parsed).blocks_kept for blocks in range(4)
    ]
    assert found == kept


@pytest.mark.parametrize(("mask", "gone"), [(False, 2), (True, 4)])
def test_block_stats_learn_what_goes(mask: bool, gone: int) -> None:
    config = MementoConfig(enable=True, mask_delimiters=mask, require_assistant_section=False)
    runtime = Runtime(Settings(config, MARKERS))
    state = RequestState([9], config, MARKERS, RequestOptions())
    assert runtime._read(state, BLOCK)
    assert (runtime.admission.block_stats.cycle, runtime.admission.block_stats.gone) == (
        len(BLOCK),
        gone,
    )
    assert runtime._read(state, BLOCK * 2)
    assert (runtime.admission.block_stats.cycle, runtime.admission.block_stats.gone) == (
        len(BLOCK),
        gone,
    )


@pytest.mark.parametrize("cached", [0, 5])
def test_a_waiting_request_gives_back_what_it_took_itself(cached: int) -> None:
    """What it found in the tree stays there when it ends."""
    runtime, req = make_runtime(), Request(TOKENS[:6], [], restart=False)
    runtime.admission.block_stats.learn(20, 10)
    req.hold(cached)
    req.to_finish = None  # type: ignore[attr-defined]
    sampling = SimpleNamespace(max_new_tokens=100, ignore_eos=True)
    req.sampling_params = sampling  # type: ignore[attr-defined]
    estimate = runtime.admission.estimate_waiting(req, 1)
    assert estimate.need == estimate.frees == 6 - cached + 1
    sampling.ignore_eos = False
    assert runtime.admission.estimate_waiting(req, 1).frees is None


def test_the_area_counts_from_the_first_output_token() -> None:
    config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
    tokens = [9, 9, *BLOCK, 9, *BLOCK, 9]
    for prompt in range(1, len(tokens)):
        machine = replay(tokens, prompt, MARKERS, config)
        held = kv_curve(machine.evictions, len(tokens))[prompt - 1 : -1]
        record = account(machine, prompt, len(tokens))
        assert record.kv_auc == sum(held)
        assert record.kv_auc_without == sum(range(prompt, len(tokens)))


def test_a_start_that_waits_says_for_what() -> None:
    said: queue.Queue[str] = queue.Queue()
    handler = logging.Handler()
    handler.emit = lambda record: said.put(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("memento_sgl.serve.radix").addHandler(handler)
    try:
        with saying_what_it_waits_for("an extension", seconds=0.01):
            assert "waits for an extension" in said.get(timeout=60)
        with saying_what_it_waits_for("nothing", seconds=600):
            pass
        assert said.empty()
    finally:
        logging.getLogger("memento_sgl.serve.radix").removeHandler(handler)
