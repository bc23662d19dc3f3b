"""The baseline without a model, and the mechanical checks of mementos."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memento_pipeline.stages.checks import check_memento, missing_formulas, missing_numbers
from memento_pipeline.stages.rules import (
    MOST_RATIO,
    extract_memento,
    forced_scores,
    rule_scores,
)
from memento_pipeline.text.split import split
from memento_pipeline.text.tokens import ApproxCounter, count
from scenes import thought

COUNTER = ApproxCounter()


def graded(text: str) -> dict[str, float | None]:
    """Last word before each candidate to its score."""
    sentences = split(text, COUNTER)
    scores = rule_scores(text, sentences)
    pieces = sentences.texts(text)
    return {
        pieces[b].split()[-1]: score
        for b, score in zip(scores.boundaries, scores.scores, strict=True)
    }


def test_steps_end_where_a_reader_would_say() -> None:
    text = (
        "I look at the first equation of the pair given above. It has two unknown numbers in it. "
        "Therefore x must be equal to seven here.\n\n"
        "Now let me try the second equation of the same pair. This one is somewhat harder to do. "
        "Could it have more than one solution at all? The discriminant answers that question."
    )
    scores = graded(text)
    assert scores["here."] == 3  # conclusion, blank line, turn
    assert scores["above."] == 0  # "It" leans back
    assert scores["all?"] == 0  # what follows answers
    assert max(scores.values()) == scores["here."]


def test_forced_scores_are_only_zeros() -> None:
    text = thought(1, 40) + "\n\nIs it so? It is so, as seen above."
    sentences = split(text, COUNTER)
    forced, ruled = forced_scores(text, sentences), rule_scores(text, sentences)
    assert set(forced.scores) <= {0.0, None}
    assert 0 < len(forced.unknown) < len(forced.scores)
    for known, score in zip(forced.scores, ruled.scores, strict=True):
        assert known is None or score == known
    assert set(ruled.decided_by) == {"rule"}
    assert forced.boundaries == ruled.boundaries == sentences.candidates


@given(st.text(alphabet="ab. \n?=1", max_size=200))
@settings(max_examples=200, deadline=None)
def test_scores_cover_every_candidate_of_any_text(text: str) -> None:
    sentences = split(text, COUNTER)
    scores = rule_scores(text, sentences)
    assert scores.unknown == ()
    assert rule_scores(text, sentences) == scores


@pytest.mark.parametrize("seed", range(8))
def test_mementos_are_extracts_of_the_right_size(seed: int) -> None:
    block = thought(seed, 12)
    memento = extract_memento(block, COUNTER)
    assert all(line in block for line in memento.split("\n"))
    share = count(COUNTER, memento) / count(COUNTER, block)
    assert 0.08 < share <= MOST_RATIO
    assert check_memento(block, memento) == ()
    assert extract_memento(block, COUNTER) == memento


def test_mementos_hold_the_result_first() -> None:
    block = (
        "Let me think about this for a while before I do anything. Hmm, maybe there is a trick. "
        "I wonder whether symmetry helps at all in this case here. Let us see what comes of it. "
        "Adding both sides, 3 + 4 = 7 is the first of the sums. Perhaps I should double it. "
        "I think that is all there is to it, more or less, so it seems to me. "
        "Therefore the answer is 14."
    )
    memento = extract_memento(block, COUNTER)
    assert memento.startswith("Therefore the answer is 14.")
    assert "Hmm" not in memento


def test_a_worthy_sentence_that_is_too_long_is_left_out() -> None:
    small = ["The sum of a and b is 7.", "Their product is then 12."]
    large = "Therefore " + " and ".join(f"x{n} = {n}" for n in range(11)) + " by the above."
    filler = "Nothing of note is said in this one. " * 8
    block = f"{filler}{small[0]} {large} {small[1]}"
    share = count(COUNTER, large) / count(COUNTER, block)
    assert MOST_RATIO < share < 2 * MOST_RATIO
    memento = extract_memento(block, COUNTER)
    assert large not in memento
    assert set(small) <= set(memento.split("\n"))


@pytest.mark.parametrize(
    "block", ["", " \n", "word", "w" * 5000, "一" * 2000, "a b " * 3000, "((((" * 500]
)
def test_mementos_of_odd_blocks_stay_inside(block: str) -> None:
    memento = extract_memento(block, COUNTER)
    assert memento in block
    assert len(memento) <= max(1, MOST_RATIO * len(block))


@pytest.mark.parametrize(
    ("block", "memento", "missing"),
    [
        ("x = 12", "12", []),
        ("x = 12", "13", ["13"]),
        ("1,000 items", "1000", []),
        ("0.50", "0.5", []),
        ("three cases", "3 cases", []),
        ("a (1,2) pair", "(1,2)", []),
        ("sum", "1. sum\n2. sum", []),
        ("sections 12, 5 and 13", "section 12.5.13", []),
        ("007", "7", []),
        ("nothing", "in 1999 and 1999", ["1999"]),
        ("x = 123", "23", ["23"]),
        ("x = 12.5", "12", ["12"]),
    ],
)
def test_numbers(block: str, memento: str, missing: list[str]) -> None:
    assert missing_numbers(block, memento) == missing


@pytest.mark.parametrize(
    ("block", "memento", "missing"),
    [
        (r"so \( x + 1 = 2 \)", "$x+1=2$", []),
        (r"so $x + 1 = 2$", r"\(x + 1 = 3\)", ["x + 1 = 3"]),
        (r"\dfrac{1}{2} \cdot y", r"$\frac{1}{2} \times y$", []),
        (r"$\left( a, b \right)$", r"\((a,b)\)", []),
        (r"$a = b$ and then $b = c$", "$a = b = c$", []),
        (r"$a = b$", "$a = d$", ["a = d"]),
        ("costs $5 and $6", "costs $5 and $6", []),
        ("x", "$$y^2$$ and \\[z^3\\]", ["y^2", "z^3"]),
    ],
)
def test_formulas(block: str, memento: str, missing: list[str]) -> None:
    assert missing_formulas(block, memento) == missing


def test_problems_are_named() -> None:
    block = "The value is 12 and " + "nothing more is said about it. " * 5
    assert check_memento(block, "The value is 12.") == ()
    assert check_memento(block, "  ") == ("the memento is empty",)
    assert check_memento(block, "12 <|block_end|>") == ("the memento contains special tokens",)
    assert check_memento(block, "</think> 12") == ("the memento contains special tokens",)
    assert check_memento("short 1", "short 1") == ("the memento is not shorter than its block",)
    many = check_memento(block, " ".join(map(str, range(100, 109))))
    assert many[0] == "number not in the block: 100"
    assert many[-1] == "4 more numbers not in the block"


def test_the_word_failed_is_no_failure() -> None:
    """A good memento may say that an attempt failed."""
    block = "The substitution failed for n = 4, so the error stays. " * 4
    assert check_memento(block, "Substitution failed for n = 4; error stays.") == ()
