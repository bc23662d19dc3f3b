"""The search for who computed an answer, on tokens made by a hash instead of a model."""

from __future__ import annotations

import hashlib
import random
from functools import partial

from history import Answer, Composition, History, Update, explain

PROMPT = 6


def chosen(held: Composition, row: int) -> int:
    """What these weights choose from a row of logits; they agree by chance one time in eight."""
    return hashlib.md5(repr((held, row)).encode()).digest()[0] % 8


def mismatches(tokens: list[int], held: Composition) -> list[int]:
    wrong = []
    for position in range(PROMPT, len(tokens)):
        now = tuple(phase for phase in held if phase[1] < position)
        if tokens[position] != chosen(now, position - 1):
            wrong.append(position)
    return wrong


def write(events: list[tuple[int, Composition]], length: int) -> list[int]:
    """Tokens of a request whose KV is as the last event at or below each row says."""
    tokens = [0] * PROMPT
    for position in range(PROMPT, length):
        held = [held for row, held in events if row < position][-1]
        tokens.append(chosen(held, position - 1))
    return tokens


def update(name: str, *, kept: bool) -> Update:
    return Update(1.0, 2.0, name, kept)


def explained(tokens: list[int], *updates: Update) -> Composition | None:
    return explain(Answer(PROMPT, partial(mismatches, tokens)), "A", updates)


def test_one_of_each() -> None:
    alone: list[tuple[int, Composition]] = [(-1, (("A", 0),))]
    kept = (20, (("A", 0), ("B", 20)))
    again = (20, (("B", 0),))
    in_place, retract = update("B", kept=True), update("B", kept=False)
    for updates in ([], [in_place], [retract]):
        assert explained(write(alone, 60), *updates) == (("A", 0),)
    assert explained(write([*alone, kept], 60), in_place) == (("A", 0), ("B", 20))
    assert explained(write([*alone, again], 60), retract) == (("B", 0),)
    assert explained(write([*alone, again], 60), in_place) == (("B", 0),)
    assert explained(write([*alone, kept], 60), retract) is None
    assert explained(write([*alone, again], 60)) is None
    early = (3, (("A", 0), ("B", 3)))
    assert explained(write([*alone, early], 60), in_place) == (("A", 0), ("B", 3))
    lost = (40, (("B", 0),))
    assert explained(write([*alone, kept, lost], 70), in_place) == (("B", 0),)


def test_one_wrong_token_is_never_explained() -> None:
    rng = random.Random(0)
    for _ in range(60):
        held: Composition = (("A", 0),)
        events, updates, row = [(-1, held)], [], 0
        for name in "BCA"[: rng.randint(0, 3)]:
            row += rng.randint(16, 24)
            keeps = rng.random() < 0.5
            held = (*held, (name, row)) if keeps else ((name, 0),)
            updates.append(update(name, kept=keeps))
            events.append((row, held))
        tokens = write(events, row + 30)
        assert explained(tokens, *updates) is not None
        position = rng.randint(row + 16, len(tokens) - 1) if updates else rng.randint(6, 29)
        tokens[position] = 9
        assert explained(tokens, *updates) is None


def test_what_may_have_computed_an_answer() -> None:
    history = History("A", [Update(1.0, 2.0, "B", True), Update(5.0, 6.0, "C", False)])
    b, c = history.updates
    assert history.during(0.0, 0.5) == ("A", [])
    assert history.during(0.0, 1.5) == ("A", [b])
    assert history.during(1.5, 3.0) == ("A", [b])
    assert history.during(2.0, 4.0) == ("B", [])
    assert history.during(2.5, 9.0) == ("B", [c])
    assert history.during(7.0, 9.0) == ("C", [])
