"""Every row of the state machine's table, and that nothing outside one complete block ever goes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine, Eviction, State, replay
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9)
BS, BE, SS, SE, IM, END, ASSISTANT, THINK, ENDED = MARKERS[:9]
X = 9


def config(**options: object) -> MementoConfig:
    base = {"enable": True, "mask_delimiters": False, "require_assistant_section": False}
    return MementoConfig.model_validate(base | options)


def spans(tokens: list[int], prompt_len: int = 0, **options: object) -> list[tuple[int, int, int]]:
    machine = replay(tokens, prompt_len, MARKERS, config(**options))
    return [(e.point, e.start, e.end) for e in machine.evictions]


WELL_FORMED = [X, BS, X, X, BE, X, SS, X, SE, X]


def test_well_formed_block() -> None:
    assert spans(WELL_FORMED) == [(8, 2, 4)]
    assert spans(WELL_FORMED, mask_delimiters=True) == [(8, 1, 5)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([BE, SS, X, SE, X], []),  # nothing open
        ([SS, X, SE], []),
        ([X, SE, X], []),
        ([BS, X, BS, X, X, BE, SS, SE], [(7, 3, 5)]),  # the open block is abandoned
        ([BS, X, BE, X, BS, X, BE, SS, SE], [(8, 5, 6)]),  # memento missing: abandoned
        ([BS, X, BE, SS, X, SE, SS, X, SE], [(5, 1, 2)]),  # second memento for the same block
        ([BS, X, SS, X, BE, SS, X, SE], [(7, 1, 4)]),  # summary_start is block content
        ([BS, X, SE, X, BE, SS, X, SE], [(7, 1, 4)]),
        ([BS, X, BE, SS, X, BS, X, BE, SS, SE], [(9, 6, 7)]),  # memento and block abandoned
        ([BS, BE, SS, X, SE], []),  # empty block
        ([BS, X, BE, SS, SS, X, SE], [(6, 1, 2)]),  # doubled summary_start
        ([BS, X, BE, BE, SS, BE, SE], [(6, 1, 2)]),  # doubled and stray block_end
        ([BS, X, X], []),  # the text ends inside
        ([BS, X, BE, X], []),
        ([BS, X, BE, SS, X], []),
    ],
)
def test_malformed_sequences(tokens: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert spans(tokens) == expected


def test_empty_block_is_counted_but_keeps_its_delimiters() -> None:
    machine = replay([BS, BE, SS, X, SE], 0, MARKERS, config(mask_delimiters=True))
    assert len(machine.blocks) == 1
    assert machine.evictions == []


def blocks(count: int) -> list[int]:
    return [BS, X, BE, SS, SE] * count


def test_keep_last_n_blocks() -> None:
    assert spans(blocks(3), keep_last_n_blocks=-1) == []
    assert spans(blocks(3), keep_last_n_blocks=0) == [(4, 1, 2), (9, 6, 7), (14, 11, 12)]
    assert spans(blocks(3), keep_last_n_blocks=1) == [(9, 1, 2), (14, 6, 7)]
    assert spans(blocks(3), keep_last_n_blocks=2) == [(14, 1, 2)]


def test_keep_last_block_for_answer_waits_for_the_next_block() -> None:
    kept = spans([*blocks(3), X, X], keep_last_block_for_answer=True)
    assert kept == [(5, 1, 2), (10, 6, 7)]
    abandoned = spans([*blocks(1), BS, X, BS, X], keep_last_block_for_answer=True)
    assert abandoned == [(5, 1, 2)]  # once, whatever starts after it


def test_nothing_goes_without_compaction_or_when_disabled() -> None:
    assert spans(blocks(2), compact_on_summary_end=False) == []
    assert spans(blocks(2), enable=False) == []


def test_restart_mode_resumes_at_the_memento() -> None:
    machine = replay([X, BS, X, BE, X, SS, X, SE], 0, MARKERS, config(restart_mode=True))
    assert machine.evictions == [Eviction(point=7, start=1, end=4, resume=5)]


TURN = [IM, ASSISTANT, X]


def test_markers_in_other_turns_are_ignored() -> None:
    user = [IM, X, *blocks(1), END]
    assert spans(user + TURN + blocks(1), require_assistant_section=True) == [(15, 12, 13)]
    after = TURN + blocks(1) + [END] + user
    assert spans(after, require_assistant_section=True) == [(7, 4, 5)]


def test_a_turn_that_ends_takes_its_open_block_along() -> None:
    cut = [*TURN, BS, X, END, *TURN, BE, SS, SE]
    assert spans(cut, require_assistant_section=True) == []


def test_the_role_must_follow_directly() -> None:
    assert spans([IM, X, ASSISTANT, *blocks(1)], require_assistant_section=True) == []
    assert spans([IM, IM, ASSISTANT, *blocks(1)], require_assistant_section=True) != []


def test_prompts_without_markup_count_generated_tokens_only() -> None:
    tokens = blocks(2)
    assert spans(tokens, 5, require_assistant_section=True) == [(9, 6, 7)]
    machine = replay(tokens, 10, MARKERS, config(require_assistant_section=True), assistant_start=0)
    assert len(machine.evictions) == 2


def test_a_turn_opened_by_the_request_also_closes() -> None:
    tokens = [X, *blocks(1), END, *blocks(1)]
    assert spans(tokens, 1, require_assistant_section=True) == [(5, 2, 3)]


def test_tokens_held_and_state() -> None:
    machine = BlockMachine(MARKERS, config())
    machine.feed_all([BS, X, X])
    assert (machine.state, machine.held(3)) == (State.BLOCK, 2)
    machine.feed_all([BE, SS, X], start=3)
    assert (machine.state, machine.held(6)) == (State.MEMENTO, 1)


def test_the_delimiter_convention_must_be_settled() -> None:
    with pytest.raises(ConfigError):
        BlockMachine(MARKERS, MementoConfig(enable=True))


tokens_strategy = st.lists(st.sampled_from([*MARKERS[:9], X]), max_size=80)


@settings(max_examples=600, deadline=None)
@given(
    tokens=tokens_strategy,
    prompt=st.integers(0, 80),
    keep=st.integers(-1, 2),
    delimiters=st.booleans(),
    sections=st.booleans(),
    chunk=st.integers(1, 7),
)
def test_only_one_complete_block_is_ever_evicted(
    tokens: list[int], prompt: int, keep: int, delimiters: bool, sections: bool, chunk: int
) -> None:
    options = config(
        keep_last_n_blocks=keep, mask_delimiters=delimiters, require_assistant_section=sections
    )
    machine = replay(tokens, min(prompt, len(tokens)), MARKERS, options)
    seen_end = 0
    for eviction in machine.evictions:
        block = next(b for b in machine.blocks if b.start <= eviction.start <= b.start + 1)
        inside = tokens[block.start + 1 : block.end]
        assert (tokens[block.start], tokens[block.end]) == (BS, BE)
        assert BS not in inside
        assert BE not in inside
        assert (eviction.start, eviction.end) == (
            (block.start, block.end + 1) if delimiters else (block.start + 1, block.end)
        )
        assert block.end < block.summary_start < block.summary_end <= eviction.point
        assert eviction.start >= seen_end
        seen_end = eviction.end
    points = [e.point for e in machine.evictions]
    assert points == sorted(set(points))
    assert len(machine.evictions) <= max(0, len(machine.blocks) - max(keep, 0))


@settings(max_examples=200, deadline=None)
@given(tokens=tokens_strategy, cut=st.integers(0, 80))
def test_feeding_in_pieces_changes_nothing(tokens: list[int], cut: int) -> None:
    options = config(require_assistant_section=True)
    whole = BlockMachine(MARKERS, options)
    whole.feed_all(tokens)
    pieces = BlockMachine(MARKERS, options)
    pieces.feed_all(tokens[:cut])
    pieces.held(min(cut, len(tokens)))
    pieces.feed_all(tokens[cut:], start=min(cut, len(tokens)))
    assert pieces.evictions == whole.evictions
    assert (pieces.phase, pieces.blocks_before) == (whole.phase, whole.blocks_before)
