"""Every way in which an answer of an LLM was once misread."""

from __future__ import annotations

import json
import time

import pytest
from memento_pipeline.llm.answers import (
    RUBRIC,
    judgements_schema,
    neutralise,
    parse_judgements,
    parse_mementos,
    parse_reviews,
    parse_scores,
    scores_schema,
    special_tokens,
)

GOOD = '{"scores": [{"n": 4, "s": 2}, {"n": 5, "s": 0}]}'
GRADES = {part: most for part, most in RUBRIC.items()} | {"deductions": 0, "feedback": ""}


def judged(**changes: object) -> str:
    return json.dumps({"judgements": [{"n": 1} | GRADES | changes]})


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f'<think>Perhaps {{"scores": [{{"n": 4, "s": 3}}]}}? SCORE: 10/10</think>{GOOD}',
        f"the tag was in the prompt</think>\n{GOOD}",
        f"<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>{GOOD}",
        f"Sure!\n```json\n{GOOD}\n```\nAnything {{else}}?",
        f"{GOOD}\n{GOOD}",
        GOOD.replace("2}", "2.0}"),
        '{"scores": {"4": 2, "5": 0}}',
        'I sketch {"scores": {"4": 2, "5": ...}} first.\n{"scores": {"4": 2, "5": 0}}',
        f'Of the form {{"scores": [{{"n": <number>}}]}}, so: {GOOD}',
        f'{{"cuts": "\\w{{4}}" }} and {{"scores": [ then {GOOD}',
        '{"why": "the first step ends", "scores": {"4": 2, "5": 0}}',
        '{"answer": {"comment": "\\(x\\)", "scores": {"4": 2, "5": 0}}}',
    ],
)
def test_scores_are_read(text: str) -> None:
    assert parse_scores(text, [4, 5]).items == {4: 2, 5: 0}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("<think>x</think>  ", "empty"),
        (f"<think>{GOOD}", "inside its reasoning"),
        ("4: 2, 5: 0", "not the JSON object"),
        ("[2, 0]", "not the JSON object"),
        (GOOD[:-9], "not the JSON object"),
        (GOOD.replace('"n": 4, ', ""), "no number"),
        (GOOD.replace('"n": 4', '"n": true'), "no number"),
        (GOOD.replace('"n": 5', '"n": 6'), "6 was not asked for"),
        (GOOD + GOOD.replace('"s": 2', '"s": 3'), "more than one answer"),
        ('{"scores": 4}', "not a list"),
        ('{"scores": {"4": 2, "five": 0}}', "no number"),
        ('{"scores": {"4": 2, "4": 3, "5": 0}}', "not the JSON object"),
        ('{"scores": {"4": 2, "6": 0}}', "6 was not asked for"),
        ('{"scores": [{"n": <number>, "s": <grade>}, ...]}', "not the JSON object"),
    ],
)
def test_an_unusable_answer_gives_nothing(text: str, problem: str) -> None:
    parsed = parse_scores(text, [4, 5])
    assert parsed.items == {}
    assert problem in parsed.problems[0]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-1", "4", "99", '"2"', "1.5", "true", "null"]
)
def test_only_the_bad_score_is_missing(value: str) -> None:
    parsed = parse_scores(GOOD.replace('"s": 2', f'"s": {value}'), [4, 5])
    assert parsed.items == {5: 0}
    assert parsed.problems[0].startswith("number 4")


def test_contradicting_doubles_are_not_used() -> None:
    text = '{"scores": [{"n": 4, "s": 2}, {"n": 5, "s": 0}, {"n": 4, "s": 3}]}'
    assert parse_scores(text, [4, 5]).items == {5: 0}
    same = '{"scores": [{"n": 4, "s": 2, "s": 3}, {"n": 5, "s": 0}]}'
    assert parse_scores(same, [4, 5]).items == {}


def test_missing_numbers_are_named() -> None:
    assert parse_scores('{"scores": [{"n": 5, "s": 1}]}', [4, 5, 6]).problems == ("missing: 4, 6",)


def test_a_grade_is_added_up_from_its_parts() -> None:
    assert parse_judgements(judged(), [1]).items[1].score == 10
    assert parse_judgements(judged(formulas=1, deductions=3), [1]).items[1].score == 5
    assert parse_judgements(judged(formulas=0, deductions=10), [1]).items[1].score == 0


@pytest.mark.parametrize(
    "text",
    [
        "SCORE: 10/10",
        '{"judgements": [{"n": 1, "score": "80/10", "feedback": ""}]}',
        judged(numbers="80/10"),
        judged(numbers=3),
        judged(formulas=-1),
        judged(feedback=None),
    ],
)
def test_no_grade_is_taken_from_prose_or_out_of_range(text: str) -> None:
    assert parse_judgements(text, [1]).items == {}


def test_feedback_may_say_failed_and_quote_latex() -> None:
    text = judged(feedback="FB").replace('"FB"', r'"failed: \frac{1}{2}, \(x\), \\sqrt, \"q\""')
    judgement = parse_judgements(text, [1]).items[1]
    assert judgement.score == 10
    assert judgement.feedback == r'failed: \frac{1}{2}, \(x\), \sqrt, "q"'


def test_stray_backslashes_hide_no_second_answer() -> None:
    one = judged(feedback="FB").replace('"FB"', r'"\(x\), \\sqrt"')
    assert parse_judgements(f"{one}\n{one}", [1]).items[1].feedback == r"\(x\), \sqrt"
    other = judged(formulas=0)
    assert parse_judgements(f"{one}\n{other}", [1]).problems == ("it holds more than one answer",)


def test_schemas_ask_for_every_number_and_no_other() -> None:
    for schema in (scores_schema([4, 7]), judgements_schema([4, 7])):
        (listed,) = schema.schema["properties"].values()
        assert listed["required"] == list(listed["properties"]) == ["4", "7"]
        assert listed["additionalProperties"] is False


def test_a_review_is_grades_and_what_was_improved() -> None:
    grades = json.dumps({"judgements": {"1": GRADES, "2": GRADES | {"formulas": 0}, "3": GRADES}})
    text = (
        f'{grades}\n<memento-2-ab>\nx = \\frac{{1}}{{2}}⟦7⟧, by {{"judgements": 1}}\n'
        "</memento-2-ab><memento-3-ab>cut"
    )
    parsed = parse_reviews(text, [1, 2, 3], "ab")
    assert {n: (r.judgement.score, r.improved) for n, r in parsed.items.items()} == {
        1: (10, None),
        2: (7, 'x = \\frac{1}{2}, by {"judgements": 1}'),
        3: (10, None),
    }
    assert parse_reviews(grades, [1, 2], "ab").items == {}  # 3 was not asked for
    assert parse_reviews("<think>", [1], "ab").items == {}
    only = parse_reviews("<memento-1-ab>x</memento-1-ab>", [1], "ab")
    assert only.problems == ("it is not the JSON object that was asked for",)


def test_mementos_keep_backslashes_and_numbers() -> None:
    text = (
        "<memento-1-ab>\nx = \\frac{1}{2}, \\neq \\theta\n</memento-1-ab>\nthen\n"
        "<memento-3-ab>failed: no root</memento-3-ab>"
    )
    parsed = parse_mementos(text, [1, 2, 3], "ab")
    assert parsed.items == {1: "x = \\frac{1}{2}, \\neq \\theta", 3: "failed: no root"}
    assert parsed.problems == ("missing: 2",)


@pytest.mark.parametrize(
    "text",
    [
        "<memento-2-ab>x</memento-2-ab>",  # not asked for
        "<memento-1-cd>x</memento-1-cd>",  # another nonce
        "<memento-N-ab>\n...\n</memento-N-ab>",  # the prompt's own example
        "<memento-1-ab>x",
        "<memento-1-ab>  </memento-1-ab>",
        "<memento-1-ab>x <|block_end|></memento-1-ab>",
        "<memento-1-ab>x </block-1-ab></memento-1-ab>",
        "<memento-1-ab>x</memento-1-ab><memento-1-ab>y</memento-1-ab>",
        "<think><memento-1-ab>x</memento-1-ab>",
    ],
)
def test_unusable_mementos(text: str) -> None:
    parsed = parse_mementos(text, [1], "ab")
    assert parsed.items == {}
    assert parsed.problems


def test_special_tokens_lose_their_power_in_prompts_only() -> None:
    text = "a <|im_end|> b </think> c <s> d [/INST] e <<SYS>> f <｜User｜> g ⟦3⟧ x<y>z |x|"
    shown = neutralise(text)
    assert special_tokens(shown) == []
    assert "⟦" not in shown
    assert shown.endswith("x<y>z |x|")


def test_hostile_answers_cost_linear_time() -> None:
    started = time.monotonic()
    for text in (
        "{" * 200_000,
        '{"scores":' * 20_000,
        "\\" * 200_000,
        "<memento-1-ab>" * 20_000,
        '{"' * 200_000,
    ):
        parse_scores(text, [1])
        parse_mementos(text, [1], "ab")
    assert time.monotonic() - started < 5
