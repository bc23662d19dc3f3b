"""Whether an answer is right. Mathematics is compared by `math-verify`, never as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from memento_frontend.evaluation.questions import EvalQuestion
from memento_sgl.errors import ConfigError

_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}")
_SAID = re.compile(r"(?i:answer|choice)(?i:\s+is)?\s*:?\s*\**\(?([A-Z])\b")
_ALONE = re.compile(r"^\s*\**\(?([A-Z])\)?[.)]?\**\s*$", re.MULTILINE)


class Reading:
    """What an answer says: a letter, a normalised text, or `math-verify`'s expressions."""

    def __init__(self, question: EvalQuestion, answer: str) -> None:
        self.value: Any = _read(question.kind, answer)

    @property
    def readable(self) -> bool:
        return bool(self.value)


def _read(kind: str, answer: str) -> Any:
    if kind == "choice":
        for pattern in (_BOXED, _SAID, _ALONE):
            if found := pattern.findall(answer):
                return found[-1]
        return None
    if kind == "text":
        return " ".join(answer.split()).casefold()
    return _math().parse(answer)


def same(kind: str, one: Any, other: Any) -> bool:
    """Whether two readings (the expected one first) say the same; False where one is empty."""
    if not one or not other:
        return False
    if kind == "math":
        return bool(_math().verify(one, other))
    return bool(one == other)


def expected(question: EvalQuestion) -> Any:
    """The reading of the right answer.

    Raises:
        ConfigError: it cannot be read, so nothing could be right.
    """
    if question.kind == "choice":
        return question.answer
    text = question.answer if question.kind == "text" else f"\\boxed{{{question.answer}}}"
    if value := _read(question.kind, text):
        return value
    raise ConfigError(
        f"the expected answer {question.answer!r} of question {question.id} is no expression that "
        "math-verify reads: compare this file with --kind text"
    )


class Graded:
    """All attempts at one question, graded.

    Attributes:
        right: for each attempt.
        readable: for each attempt, whether it gave an answer at all.
        majority_right: whether the answer that most attempts gave is right; of equally many the
            first. Attempts that cannot be read have no vote.
    """

    def __init__(self, question: EvalQuestion, answers: Sequence[str]) -> None:
        gold = expected(question)
        readings = [Reading(question, answer) for answer in answers]
        self.readable = [reading.readable for reading in readings]
        groups: list[tuple[Any, list[int]]] = []
        for number, reading in enumerate(readings):
            if not reading.readable:
                continue
            for value, members in groups:
                if same(question.kind, value, reading.value):
                    members.append(number)
                    break
            else:
                groups.append((reading.value, [number]))
        self.right = [False] * len(answers)
        self.majority_right = False
        most = 0
        for value, members in groups:
            is_right = same(question.kind, gold, value)
            for number in members:
                self.right[number] = is_right
            if len(members) > most:
                most, self.majority_right = len(members), is_right


def _math() -> Any:
    try:
        import math_verify
    except ImportError:
        raise ConfigError(
            "comparing mathematics needs the extra `eval`: pip install 'memento-sgl[eval]', or "
            "compare as text with --kind text"
        ) from None
    return math_verify
