"""Thought and content: every rule once, and any way to cut the text into chunks."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memento_sgl.serve.thought import Piece, ThoughtSplitter

MARKERS = ("<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>")
BLOCKS = "<|block_start|>1+1=2;<|block_end|>\n<|summary_start|>a=2<|summary_end|>\n"
PARTS = st.sampled_from(
    [
        *MARKERS,
        "<think>",
        "</think>",
        "<tool_call>",
        "\n",
        " ",
        "<",
        "<|",
        "</",
        "th",
        "ink>",
        "a=2",
    ]
)
CHUNKS = st.lists(st.lists(PARTS, max_size=4).map("".join), max_size=12)


def split(*chunks: str, markers: bool = False, **options: Any) -> Piece:
    splitter = ThoughtSplitter(MARKERS[0], () if markers else MARKERS, **options)
    pieces = [*map(splitter.push, chunks), splitter.close()]
    return Piece(*map("".join, zip(*pieces, strict=True)))


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        (f"<think>\n{BLOCKS}</think>\n\nTwo.\n", "1+1=2;\na=2", "Two.\n"),
        (f"\n<think>{BLOCKS}</think>  Two.", "1+1=2;\na=2", "  Two."),
        (f"{BLOCKS}</think>Two.", "1+1=2;\na=2", "Two."),
        ("Two, without a thought.\n", "", "Two, without a thought.\n"),
        ("\n  Two.", "", "\n  Two."),
        ("See <think>: </think>", "", "See <think>: </think>"),
        ("<think>\nstill at it\n", "still at it", ""),
        ("<think>a</thin", "a</thin", ""),
        ("<thin", "", "<thin"),
        ("<think></think>\n", "", ""),
        ("</think>\nTwo.", "", "Two."),
        ("<think>a\n</think>\n</think> <|block_end|>", "a", "</think> <|block_end|>"),
        ("<think>a <think> b</think>c", "a <think> b", "c"),
        ('<think>add\n<tool_call>\n{"name"', "add", '<tool_call>\n{"name"'),
        ("", "", ""),
    ],
)
def test_rules(text: str, thought: str, content: str) -> None:
    assert split(text) == (thought, content)


def test_markers_stay_when_asked_for() -> None:
    text = f"<think>\n{BLOCKS}</think>\nTwo."
    assert split(text, markers=True) == (BLOCKS.rstrip("\n"), "Two.")


def test_a_thought_that_the_prompt_opened() -> None:
    assert split("\nplain\n</think>\nTwo.", opened=True) == ("plain", "Two.")
    assert split("\nplain", opened=True) == ("plain", "")
    assert split("<thin", opened=True) == ("<thin", "")
    assert split("<think>again</think>Two.", opened=True) == ("again", "Two.")


def test_an_answer_that_the_prompt_began() -> None:
    assert split("\nb</think>c", before="<think>a") == ("\nb", "c")
    assert split("\nb", before="<think>a</think>") == ("", "\nb")
    assert split("<think>b", before="The total") == ("", "<think>b")
    assert split("b</think>c", before="a", opened=True) == ("b", "c")
    assert split("<think>b</think>c", before="") == ("b", "c")


@given(CHUNKS, st.booleans(), st.booleans(), st.sampled_from(["", "a", "<think>", "</think>"]))
def test_any_chunks_give_the_same(
    chunks: list[str], markers: bool, opened: bool, before: str
) -> None:
    options: dict[str, Any] = {"markers": markers, "opened": opened, "before": before}
    text = "".join(chunks)
    whole = split(text, **options)
    assert split(*chunks, **options) == whole
    assert split(*text, **options) == whole


@given(CHUNKS, st.booleans())
def test_nothing_is_lost_but_tags_and_newlines(chunks: list[str], opened: bool) -> None:
    text = "".join(chunks)
    thought, content = map(re.escape, split(text, markers=True, opened=opened))
    assert re.fullmatch(rf"\s*(<think>)?\n*{thought}\n*(</think>)?\n*{content}", text)


@settings(deadline=None)  # SGLang takes a while to import
@given(CHUNKS, st.booleans(), st.booleans(), st.booleans())
def test_the_detector_streams_what_it_parses(
    chunks: list[str], stream: bool, nonempty: bool, opened: bool
) -> None:
    pytest.importorskip("sglang")
    from memento_sgl.serve.reasoning_parser import MementoDetector

    def detector() -> MementoDetector:
        new = MementoDetector(stream_reasoning=stream, force_nonempty_content=nonempty)
        new.adapt(MARKERS, show_markers=False, opened=opened)
        return new

    whole = detector().detect_and_parse("".join(chunks))
    streaming = detector()
    pieces = [*map(streaming.parse_streaming_increment, chunks), streaming.finish()]
    thought = "".join(piece.reasoning_text for piece in pieces)
    content = "".join(piece.normal_text for piece in pieces)
    expected = split(*chunks, opened=opened)
    if nonempty and not expected.content:
        assert (whole.reasoning_text, whole.normal_text) == ("", expected.thought)
        assert content in ("", expected.thought)
    else:
        assert (thought, content) == (whole.reasoning_text, whole.normal_text) == expected
