"""Several attempts at one question, and the answer that most of them gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from memento_frontend.results import Reasoning


@dataclass(frozen=True, slots=True)
class Vote:
    """Several attempts at one question.

    Attributes:
        answer: the one that most attempts gave, white space around it aside; of equally many the
            first. Attempts without an answer have no vote.
        votes: how many gave it; 0 if none gave any.
        attempts: all of them, in order.
    """

    answer: str
    votes: int
    attempts: tuple[Reasoning, ...]


def majority(attempts: Sequence[Reasoning]) -> Vote:
    """Count equal answers."""
    answers = Counter(answer for attempt in attempts if (answer := attempt.answer.strip()))
    answer, votes = answers.most_common(1)[0] if answers else ("", 0)
    return Vote(answer, votes, tuple(attempts))
