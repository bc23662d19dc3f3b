"""Constrained emission: the table, and the automaton on the device that follows the CPU's."""

from __future__ import annotations

import random
import re

import pytest

torch = pytest.importorskip("torch")

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from memento_sgl.engine.automaton import EmissionAutomaton
from memento_sgl.errors import RequestError
from memento_sgl.offline.reference import constrained
from memento_sgl.request.overrides import check_options
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.emission import Emit, Structure, permitted, situation, special_tokens
from memento_sgl.rule.machine import BlockMachine
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9)
NEWLINE, END, LETTER = 10, 11, 12
STRUCTURE = Structure((MARKERS.im_end, END), (NEWLINE,))
VOCABULARY = 14
SLOT = 3
PLAIN = MementoConfig(enable=True, mask_delimiters=False)
MODES = (
    {},
    {"max_block_tokens": 3, "max_summary_tokens": 2},
    {"constrain": "strict"},
    {
        "constrain": "strict",
        "max_block_tokens": 3,
        "max_summary_tokens": 2,
        "max_blocks": 2,
    },
    {
        "constrain": "strict",
        "min_block_tokens": 2,
        "max_block_tokens": 2,
        "min_summary_tokens": 1,
        "min_blocks": 1,
    },
)
TOKENS = st.integers(0, VOCABULARY - 1)
TURN = [MARKERS.im_start, MARKERS.assistant]


def state_of(prompt: list[int], options: dict[str, object]) -> RequestState:
    return RequestState(prompt, PLAIN, MARKERS, RequestOptions.parse(options))


def takes(prompt: list[int], options: dict[str, object]) -> bool:
    """Whether the server takes this prompt."""
    try:
        check_options({"memento": options}, prompt, Settings(PLAIN, MARKERS, STRUCTURE))
    except RequestError:
        return False
    return True


def new_automaton() -> EmissionAutomaton:
    return EmissionAutomaton(8, VOCABULARY, MARKERS, STRUCTURE, "cpu")


def spell(tokens: list[int]) -> str:
    """B b block, M m memento, T t thought, E end, n newline, ? a new turn, x other."""
    names = {1: "B", 2: "b", 3: "M", 4: "m", 8: "T", 9: "t", 6: "E", END: "E", NEWLINE: "n"}
    names[MARKERS.im_start] = "?"
    return "".join(names.get(token, "x") for token in tokens)


@settings(deadline=None)
@given(
    prompt=st.lists(TOKENS, max_size=12),
    ranking=st.lists(st.permutations(range(VOCABULARY)), max_size=50),
    mode=st.sampled_from(MODES),
    reload=st.integers(0, 50),
)
@example(
    prompt=[*TURN, 8, 9], ranking=[[*range(6), 13, *range(7, 13), 6]] * 3, mode=MODES[2], reload=2
)
def test_the_device_follows_the_table(
    prompt: list[int], ranking: list[list[int]], mode: dict[str, object], reload: int
) -> None:
    state, automaton = state_of(prompt, mode), new_automaton()
    assume(takes(prompt, mode))
    automaton.load([SLOT], [state])
    slots = torch.tensor([SLOT])
    special = special_tokens(MARKERS, STRUCTURE)
    output: list[int] = []
    for step, order in enumerate(ranking):
        if step == reload:  # a redone step or a rebuilt row
            automaton.load([SLOT], [state])
        logits = torch.tensor(order, dtype=torch.float32)[None]
        may = permitted(state.machine, state.length, state.config, MARKERS, STRUCTURE)
        expected = constrained(logits[0], may, special)
        automaton.constrain(slots, logits)
        assert torch.equal(logits[0], expected)
        sampled = logits.argmax(-1)
        automaton.advance(slots, sampled)
        output.append(int(sampled))
        state.observe(output)


def test_the_device_follows_a_role_of_several_tokens() -> None:
    markers = MARKERS._replace(role_name=(12, 12), assistant=13, section_starts=(0,))
    automaton = EmissionAutomaton(8, VOCABULARY, markers, STRUCTURE, "cpu")
    state = RequestState([MARKERS.im_start], PLAIN, markers, RequestOptions.parse(MODES[1]))
    automaton.load([SLOT], [state])
    rng, output, seen = random.Random(1), [], set()
    for _ in range(1500):
        token = rng.choice([5, 12, 12, 12, 13, 13, 1, 2, 3, 4, 6 if rng.random() < 0.3 else 0])
        automaton.advance(torch.tensor([SLOT]), torch.tensor([token]))
        output.append(token)
        state.observe(output)
        here = situation(state.machine, state.length, state.config)
        now, held, *_ = automaton._now[SLOT].tolist()
        assert now == here.state
        if here.state in (Emit.FREE_ROLE, Emit.FREE_BLOCK, Emit.FREE_MEMENTO):
            assert held == here.held
        seen.add((here.state, min(here.held, 2)))
    assert {(Emit.FREE_ROLE, 2), (Emit.FREE_MEMENTO, 2), (Emit.FREE_NO_SECTION, 2)} <= seen


STRICT = re.compile(r"Tn{0,2}(B[xn]*bn{0,2}M[xn]*mn{0,2})*t[xn]*E?")


@settings(deadline=None)
@given(
    ranking=st.lists(st.permutations(range(VOCABULARY)), min_size=1, max_size=80),
    mode=st.sampled_from(MODES[2:]),
)
def test_strict_output_is_well_formed(ranking: list[list[int]], mode: dict[str, object]) -> None:
    state = state_of(TURN, mode)
    output: list[int] = []
    for order in ranking:
        may = permitted(state.machine, state.length, state.config, MARKERS, STRUCTURE)
        row = constrained(
            torch.tensor(order, dtype=torch.float32), may, special_tokens(MARKERS, STRUCTURE)
        )
        assert torch.isfinite(row).any()
        output.append(int(row.argmax()))
        state.observe(output)
        if output[-1] in STRUCTURE.ends:
            break
    # What was cut off, completed in the one way that is always possible, is well-formed.
    ending = {Emit.BLOCK: "bMmt", Emit.CLOSED: "Mmt", Emit.MEMENTO: "mt", Emit.THOUGHT: "t"}
    text = spell(output)
    here = situation(state.machine, state.length, state.config)
    assert STRICT.fullmatch(text + ending.get(here.state, "")), text
    blocks = state.machine.blocks
    limits = state.config.limits
    if limits.max_blocks:
        assert len(blocks) <= limits.max_blocks
    for block in blocks:
        assert limits.min_block <= block.block_tokens
        assert limits.max_block == 0 or block.block_tokens <= limits.max_block
        assert limits.min_summary <= block.summary_tokens
        assert limits.max_summary == 0 or block.summary_tokens <= limits.max_summary
    if "t" in text:
        assert len(blocks) >= limits.min_blocks


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([*TURN], (Emit.START, 0)),
        ([*TURN, NEWLINE, 8], (Emit.THOUGHT, 0)),
        ([*TURN, 8, 1, LETTER], (Emit.BLOCK, 0)),
        ([*TURN, 8, 1, LETTER, 2], (Emit.CLOSED, 0)),
        ([*TURN, 8, 1, 2, 3, LETTER], (Emit.MEMENTO, 0)),
        ([*TURN, 8, 1, 2, 3, 4, NEWLINE], (Emit.THOUGHT, 1)),
        ([*TURN, 1, 2, 3, 4], (Emit.THOUGHT, 1)),  # blocks without <think>
        ([*TURN, 8, 1, 2, 3, 4, 9, LETTER], (Emit.ANSWER, 1)),
        ([*TURN, 8, 1, LETTER, 9], (Emit.ANSWER, 0)),  # the thought ended inside a block
        ([*TURN, 8, 1, 2, 3, 4, 9, 6, *TURN], (Emit.START, 1)),  # the next turn
        ([*TURN, 8, 1, 2, 3, 4, 9, 6, *TURN, 8], (Emit.THOUGHT, 0)),
        ([5, LETTER, 8, 6, *TURN], (Emit.START, 0)),  # <think> of a user
        ([*TURN, 8, 9, 8], (Emit.ANSWER, 0)),
    ],
)
def test_where_a_prompt_leaves_the_structure(prompt: list[int], expected: tuple[Emit, int]) -> None:
    state = state_of(prompt, {"constrain": "strict"})
    here = situation(state.machine, state.length, state.config)
    assert (here.state, here.blocks) == expected


def test_slots_do_not_mix() -> None:
    automaton = new_automaton()
    opened = [*TURN, 1, LETTER, LETTER, LETTER]
    capped = {"max_block_tokens": 3}
    automaton.load([2, 5], [state_of(opened, capped), state_of(opened, {})])
    logits = torch.zeros(2, VOCABULARY)
    logits[:, NEWLINE] = 1.0
    automaton.constrain(torch.tensor([5, 2]), logits)
    assert logits.argmax(-1).tolist() == [NEWLINE, MARKERS.block_end]
    assert torch.isinf(logits[1]).sum() == VOCABULARY - 1
    assert torch.isfinite(logits[0]).all()


def test_the_cap_of_each_kind() -> None:
    automaton = new_automaton()
    options = {"max_block_tokens": 3, "max_summary_tokens": 2}
    in_block, in_memento = [*TURN, 1, LETTER, LETTER], [*TURN, 1, 2, 3, LETTER, LETTER]
    automaton.load([0, 1], [state_of(in_block, options), state_of(in_memento, options)])
    logits = torch.zeros(2, VOCABULARY)
    logits[:, LETTER] = 1.0
    automaton.constrain(torch.tensor([0, 1]), logits)
    assert logits.argmax(-1).tolist() == [LETTER, MARKERS.summary_end]  # both hold two tokens


def test_separators_are_not_content() -> None:
    machine = BlockMachine(MARKERS, PLAIN)
    machine.feed_all([*TURN, 8, NEWLINE, 1, LETTER, NEWLINE, 2, NEWLINE, 3, LETTER, 4])
    (block,) = machine.blocks
    assert (block.block_tokens, block.summary_tokens) == (2, 1)


@pytest.mark.parametrize(
    ("prompt", "markers", "grammar", "options", "reason"),
    [
        ([5, LETTER], MARKERS, False, {"constrain": "strict"}, "ends inside an assistant turn"),
        (
            TURN,
            MARKERS._replace(think_end=None),
            False,
            {"constrain": "strict"},
            "'</think>' to be",
        ),
        (TURN, MARKERS, True, {"constrain": "strict"}, "contradicts constrain=strict"),
        (TURN, MARKERS, True, {"max_block_tokens": 4}, "contradicts constrain=caps"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    prompt: list[int], markers: MarkerIds, grammar: bool, options: dict[str, object], reason: str
) -> None:
    settings = Settings(PLAIN, markers, STRUCTURE)
    with pytest.raises(RequestError, match=reason):
        check_options({"memento": options}, prompt, settings, grammar=grammar)


def test_a_grammar_may_constrain_the_answer() -> None:
    settings = Settings(PLAIN, MARKERS, STRUCTURE)
    options = {"memento": {"constrain": "strict"}}
    check_options(options, [*TURN, 8, 9], settings, grammar=True)
    check_options({"memento": {}}, TURN, settings, grammar=True)
