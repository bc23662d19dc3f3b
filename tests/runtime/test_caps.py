"""The automaton on the device follows the machine on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

from memento_sgl.caps import CapAutomaton
from memento_sgl.config import MementoConfig, RequestOptions
from memento_sgl.machine import forced_token
from memento_sgl.markers import MarkerIds
from memento_sgl.request import RequestState

MARKERS = MarkerIds(1, 2, 3, 4, 5, 6, 7)
VOCABULARY = 12
SLOT = 3
CONFIG = MementoConfig(enable=True, mask_delimiters=False, max_block_tokens=3, max_summary_tokens=2)
TOKENS = st.integers(0, VOCABULARY - 1)


@given(prompt=st.lists(TOKENS, max_size=12), wanted=st.lists(TOKENS, max_size=60))
def test_forces_what_the_machine_would(prompt: list[int], wanted: list[int]) -> None:
    state = RequestState(prompt, CONFIG, MARKERS, RequestOptions())
    automaton = CapAutomaton(8, VOCABULARY, MARKERS, "cpu")
    automaton.load([SLOT], [state])
    slots = torch.tensor([SLOT])
    output: list[int] = []
    for token in wanted:
        logits = torch.zeros(1, VOCABULARY)
        logits[0, token] = 1.0
        automaton.constrain(slots, logits)
        forced = forced_token(state.machine, state.length, MARKERS)
        sampled = int(logits[0].argmax())
        assert sampled == (token if forced is None else forced)
        automaton.advance(slots, torch.tensor([sampled]))
        output.append(sampled)
        state.observe(output)


def test_slots_do_not_mix() -> None:
    automaton = CapAutomaton(8, VOCABULARY, MARKERS, "cpu")
    opened = [5, 7, 1, 8, 8, 8]
    states = [
        RequestState(opened, CONFIG, MARKERS, options)
        for options in (RequestOptions(), RequestOptions(max_block_tokens=0, max_summary_tokens=0))
    ]
    automaton.load([2, 5], states)
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 9] = 1.0
    automaton.constrain(torch.tensor([5, 2]), logits)
    assert logits.argmax(-1).tolist() == [9, MARKERS.block_end]
    assert torch.isinf(logits[1]).sum() == VOCABULARY - 1


def test_each_cap_is_that_of_its_kind() -> None:
    automaton = CapAutomaton(8, VOCABULARY, MARKERS, "cpu")
    in_block, in_memento = [5, 7, 1, 8, 8], [5, 7, 1, 8, 2, 3, 8, 8]
    states = [
        RequestState(prompt, CONFIG, MARKERS, RequestOptions()) for prompt in (in_block, in_memento)
    ]
    automaton.load([0, 1], states)
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 9] = 1.0
    automaton.constrain(torch.tensor([0, 1]), logits)
    assert logits.argmax(-1).tolist() == [9, MARKERS.summary_end]  # both hold two tokens
