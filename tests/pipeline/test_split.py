"""The splitter: nothing lost, ever; ends where a reader would end a sentence."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memento_pipeline.records import Sentences
from memento_pipeline.text import protect as _protect
from memento_pipeline.text.split import MIN_TOKENS, is_boundary, split
from memento_pipeline.text.tokens import ApproxCounter

COUNTER = ApproxCounter()
PIECES = st.sampled_from(
    [
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "$",
        "$$",
        "\\[",
        "\\]",
        "\\(",
        "\\)",
        "`",
        "\\begin{align}",
        "\\end{align}",
        "\\\\[2pt]",
        "3.14",
        "</think>",
        "```\n",
        "```py\n",
        "\n",
        "\n\n",
        " ",
        "\t",
        "    ",
        ". ",
        "word. Word",
        "e.g. this",
        ":\n",
        "x = 2",
        "So ",
        "Therefore, ",
        "\u4f60\u597d\u3002",
        "\u201d",
        "\uff1f",
        "\ufb01",
        "\u00e9",
        "e\u0301",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\r\n",
        "\u0000",
        "\u2028",
        "def f():\n    return 1\n",
        "a;\n",
        "<|block_start|>",
    ]
)
TEXTS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=60).map("".join))


def pieces(text: str) -> list[str]:
    return split(text, COUNTER).texts(text)


def units(text: str) -> list[str]:
    sentences = split(text, COUNTER)
    return [text[slice(*sentences.span(a, b))] for a, b in sentences.units]


def check(text: str) -> Sentences:
    sentences = split(text, COUNTER)
    parts = sentences.texts(text)
    assert "".join(parts) == text
    assert "".join(parts).encode("utf-8", "surrogatepass") == text.encode("utf-8", "surrogatepass")
    assert all(parts)
    assert sum(sentences.tokens) == len(COUNTER.starts(text))
    assert all(is_boundary(a, b) for a, b in pairwise(parts))
    return sentences


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_lossless(text: str) -> None:
    check(text)


@pytest.mark.parametrize(
    "piece",
    ["(", "$", "$$", "\\[", "\\(", "`", "```\n", "\\begin{a}", "((a)", ". ", "x;\n", "。", " ", "a",
     "\n\n    x", "(a(b", "1. ", "e.g. ", "é", "$a ", "\\\\", "a\n```b\n"],
)  # fmt: skip
def test_one_megabyte_of_anything(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    sentences = split(text, COUNTER)
    assert sentences.edges[-1] == len(text)
    assert "".join(sentences.texts(text)) == text


def test_one_megabyte_line_is_split_at_its_sentences() -> None:
    text = "Here the value of the sum is known to be positive. " * 20_000
    assert len(check(text)) == 20_000


@pytest.mark.parametrize(
    "opener", ["(", "$", "$$", "\\[", "\\(", "`", "```\n", "\\begin{align}", "{"]
)
def test_an_unbalanced_bracket_does_not_disable_splitting(opener: str) -> None:
    tail = "This is a plain sentence of some length. " * 50
    assert len(pieces(f"Here it goes {opener} and on we go.\n\n{tail}")) >= 50


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First one here. Second one there.", ["First one here. ", "Second one there."]),
        ("Is it so? Yes! It is.", ["Is it so? ", "Yes! ", "It is."]),
        ("Pi is 3.14 and e is 2.71. Next.", ["Pi is 3.14 and e is 2.71. ", "Next."]),
        ("See e.g. Smith for it. Then go.", ["See e.g. Smith for it. ", "Then go."]),
        ("By Fig. 3 and Eq. (2) we win. Good.", ["By Fig. 3 and Eq. (2) we win. ", "Good."]),
        ("As J. R. Smith said. Good.", ["As J. R. Smith said. ", "Good."]),
        ("So the point is B. Next comes C.", ["So the point is B. ", "Next comes C."]),
        ("It holds (see above. Really.) now. Go.", ["It holds (see above. Really.) now. ", "Go."]),
        ("Let $a. B$ be. Go on.", ["Let $a. B$ be. ", "Go on."]),
        ("It costs $5. Then $6 more. Fine.", ["It costs $5. ", "Then $6 more. ", "Fine."]),
        ("1. First item\n2. Second item", ["1. First item\n", "2. Second item"]),
        ("A para.\n\nAnother para.", ["A para.\n\n", "Another para."]),
        ("你好。我们开始吧！好的", ["你好。", "我们开始吧！", "好的"]),
        ("他说“走。”然后走了。", ["他说“走。”", "然后走了。"]),
        ('He said "stop." Then left.', ['He said "stop." ', "Then left."]),
        ("  leading space. Kept here.  ", ["  leading space. ", "Kept here.  "]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(
    "atomic",
    [
        "```python\nx = 1\n\nprint(x). Done. Yes\n```",
        "~~~\nA b. C d.\n\nE f.\n~~~",
        "\\[\nx = 1. Y\n\n= 2 \\\\[2pt]\n\\]",
        "$$\nx = 1. Y\n= 2\n$$",
        "\\begin{align}\na &= 1. B\\\\[2pt]\n\nc &= 2\n\\end{align}",
        "def f(x):\n    y = x + 1\n\n    return y",
        "int main() {\n    int a = 1;\n    return a;\n}",
    ],
)
def test_code_and_display_math_are_atomic(atomic: str) -> None:
    text = f"Here is something to look at.\n\n{atomic}\n\nAnd the rest of it follows here."
    parts = pieces(text)
    assert len(parts) == 3
    assert parts[1].strip() == atomic


def test_blank_lines_and_latex_spacing_survive() -> None:
    text = "One two three four five.\n\n\n\n\\[ a \\\\[2pt] b \\]\n\n  Six.\r\n\r\nSeven"
    assert "".join(pieces(text)) == text
    assert any("\\\\[2pt]" in piece for piece in pieces(text))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("We have the following two equations here:\n\nThe first equation has one root only.", 1),
        ("The value must be at least three here. Therefore the sum is at least nine then.", 1),
        ("The value must be at least three here. The sum is at least nine in any case.", 2),
        ("The value must be at least three here.\n\nx + y = 3\n\nz = 4 + x", 1),
        ("The value must be at least three here. Hmm. The sum is at least nine in any case.", 2),
        ("Let me check that.\n\nThe value must be at least three here, whatever happens.", 1),
        ("所有满足条件的整数都是奇数而且是正数。因此答案一定是三或者五或者七。", 1),
    ],
)
def test_no_cut_flags(text: str, count: int) -> None:
    assert len(units(text)) == count


def test_short_fragments_are_never_a_unit() -> None:
    text = "Yes. No. " * 10 + "The value must be at least three here.\n\nOk.\n\n" * 3
    sentences = split(text, COUNTER)
    assert min(sum(sentences.tokens[a : b + 1]) for a, b in sentences.units) >= MIN_TOKENS


def test_a_long_indented_text_is_not_one_code_block() -> None:
    text = "    This is a sentence that somebody indented for no good reason\n" * 3000
    assert len(text) > _protect.MAX_CODE
    assert len(pieces(text)) == 3000


def test_empty_and_blank() -> None:
    assert len(split("", COUNTER)) == 0
    assert pieces(" \n\n ") == [" \n\n "]


def test_time_grows_with_the_length_not_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: every candidate is looked at once, whatever the protected spans are."""
    calls = 0
    original = re.Pattern.finditer

    class Spy:
        def __init__(self, pattern: re.Pattern[str]) -> None:
            self.pattern = pattern

        def finditer(self, *args: object) -> list[re.Match[str]]:
            nonlocal calls
            found = list(original(self.pattern, *args))  # type: ignore[arg-type]
            calls += len(found)
            return found

    monkeypatch.setattr(_protect, "_INLINE", Spy(_protect._INLINE))
    sizes = []
    for repeats in (200, 400):
        calls = 0
        split("A (b) `c` $d$ \\(e\\) f. " * repeats, COUNTER)
        sizes.append(calls)
    assert sizes[1] == 2 * sizes[0]
