"""Block events by name, and which tokens were forced: both against slower definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memento_sgl.rule.block_events import read_marker
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import Structure, is_forced, permitted
from memento_sgl.rule.machine import BlockMachine
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9)
STRUCTURE = Structure((6, 11), (10,))
LETTERS = {letter: token for token, letter in enumerate("xBbMm[]aTtnEyz")}
FREE = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)


def machine_of(config: MementoConfig = FREE, start: int | None = None) -> BlockMachine:
    return BlockMachine(MARKERS, config, section_start=start)


def story(text: str, config: MementoConfig = FREE) -> list[str]:
    """Events of a text as `kind@index`, with the tokens where there are any."""
    machine = machine_of(config)
    told = []
    for index, letter in enumerate(text):
        if (token := LETTERS[letter]) in machine.classes:
            for kind, at, tokens in read_marker(machine, index, token)[0]:
                told.append(f"{kind}@{at}" + ("" if tokens is None else f":{tokens}"))
    return told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "TBxxbMxmt",
            "think@0 block_open@1 block_close@4:2 memento_open@5 memento_close@7:1 answer@8",
        ),
        ("BxBb", "think@0 block_open@0 abandon@2:1 block_open@2 block_close@3:0"),
        ("BbB", "think@0 block_open@0 block_close@1:0 abandon@2:0 block_open@2"),
        (
            "BbMxxB",
            "think@0 block_open@0 block_close@1:0 memento_open@2 abandon@5:2 block_open@5",
        ),
        ("bMmb", ""),
        ("BxMmb", "think@0 block_open@0 block_close@4:3"),
    ],
)
def test_a_text_by_its_events(text: str, told: str) -> None:
    assert story(text) == told.split()


def test_a_turn_that_ends_abandons_its_block() -> None:
    chat = FREE.model_copy(update={"require_assistant_section": True})
    assert story("Bb[aBxx]", chat) == ["think@4", "block_open@4", "abandon@7:2"]


@given(st.lists(st.integers(0, 13), max_size=60), st.booleans())
def test_reading_is_feeding(tokens: list[int], chat: bool) -> None:
    """Same machine afterwards; blocks and evictions are those that were told."""
    config = FREE.model_copy(update={"require_assistant_section": chat})
    plain, read = machine_of(config), machine_of(config)
    due = plain.feed_all(tokens)
    events, told = [], []
    for index, token in enumerate(tokens):
        if token in read.classes:
            more, eviction = read_marker(read, index, token)
            events += more
            told += [eviction] if eviction else []
    assert (read.state, read.phase, read.blocks) == (plain.state, plain.phase, plain.blocks)
    assert told == due
    closed = [event.at for event in events if event.kind == "memento_close"]
    assert closed == [block.summary_end for block in plain.blocks]
    lengths = [event.tokens for event in events if event.kind == "memento_close"]
    assert lengths == [block.summary_tokens for block in plain.blocks]
    opened = sum(event.kind == "block_open" for event in events)
    abandoned = sum(event.kind == "abandon" for event in events)
    still_open = opened - abandoned - len(closed)
    assert still_open in (0, 1)


MODES = (
    {"max_block_tokens": 2, "max_summary_tokens": 1},
    {"constrain": "strict"},
    {"constrain": "strict", "max_block_tokens": 2, "max_summary_tokens": 1, "max_blocks": 2},
    {"constrain": "strict", "min_block_tokens": 2, "max_block_tokens": 2, "min_blocks": 1},
)


@given(
    st.sampled_from(MODES),
    st.lists(st.integers(0, 13), max_size=40),
    st.sampled_from([STRUCTURE, Structure((6,), ())]),
)
def test_a_token_is_forced_if_nothing_else_is_permitted(
    mode: dict[str, object], tokens: list[int], structure: Structure
) -> None:
    config = MementoConfig.model_validate({**FREE.model_dump(), **mode})
    machine = machine_of(config, start=0)
    for index, token in enumerate(tokens):
        allowed = permitted(machine, index, config, MARKERS, structure)
        expected = not allowed.text and len(allowed.special) == 1
        assert is_forced(machine, index, config, MARKERS, structure) is expected
        if expected:
            (token,) = allowed.special
            assert token in machine.classes  # so that a forced token is always looked at
        machine.feed(index, token)
