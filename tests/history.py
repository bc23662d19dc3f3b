"""Which weights can explain an answer that was written while a server changed them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

# How far before the first token that the old weights would not have chosen the new ones may have
# taken over: models agree by chance, and a token in flight is chosen by the old weights.
LOOK_BACK = 12


class Update(NamedTuple):
    """Weights loaded between two readings of a clock; `kept`: running requests kept their KV."""

    begun: float
    ended: float
    name: str
    kept: bool


# Weights by name, each with the row of logits from which they computed; the first from 0.
Composition = tuple[tuple[str, int], ...]


@dataclasses.dataclass
class History:
    """The updates of one server, oldest first, and the weights it started with."""

    first: str
    updates: list[Update] = dataclasses.field(default_factory=list)

    def during(self, begun: float, ended: float) -> tuple[str, list[Update]]:
        """The weights at `begun` and the updates that may have come until `ended`."""
        before = [update for update in self.updates if update.ended <= begun]
        rest = self.updates[len(before) :]
        name = before[-1].name if before else self.first
        return name, [update for update in rest if update.begun < ended]


class Answer(NamedTuple):
    """What is to be explained; `mismatches(composition)` gives positions of tokens that these
    weights would not have chosen, rising."""

    prompt_len: int
    mismatches: Callable[[Composition], Sequence[int]]


def explain(answer: Answer, first: str, updates: Sequence[Update]) -> Composition | None:
    """Who computed an answer, or None: nobody who had the chance.

    A request goes on with the KV it has when an update keeps it, and has all of it computed again
    by the weights of the day whenever it lost its row.
    """
    return _explain(answer, ((first, 0),), 0, tuple(updates))


def _explain(
    answer: Answer, held: Composition, row: int, ahead: tuple[Update, ...]
) -> Composition | None:
    wrong = [position for position in answer.mismatches(held) if position > row]
    if not wrong:
        return held
    last = wrong[0] - 1
    for begin, composition, left in _next(answer, held, row, last, ahead):
        if (found := _explain(answer, composition, begin, left)) is not None:
            return found
    return None


def _next(
    answer: Answer, held: Composition, row: int, last: int, ahead: tuple[Update, ...]
) -> Iterable[tuple[int, Composition, tuple[Update, ...]]]:
    """What may have happened at or before row `last`, likely things first: where, what computed
    from there, and the updates still ahead."""
    name = held[-1][0]
    if len(held) > 1:
        yield last, ((name, 0),), ahead
    for i, update in enumerate(ahead):
        left = ahead[i + 1 :]
        yield last, ((update.name, 0),), left
        if not update.kept or update.name == name:
            continue
        lowest = max(row, last - LOOK_BACK)
        if last < answer.prompt_len + LOOK_BACK:
            lowest = 0  # it may have come between two chunks of the prompt
        lowest = max(lowest, held[-1][1] + 1)
        for begin in range(last, lowest - 1, -1):
            yield begin, (*held, (update.name, begin)), left


def mismatches_of(
    models: dict[str, Any],
    compare: Callable[[Callable[..., Any]], Sequence[Any]],
    tie: float,
    composition: Composition,
) -> list[int]:
    """Positions that differ by more than `tie` from what a composition of models gives.

    Args:
        compare: `compare_greedy` of one answer, which takes the maker of logits.
    """
    from memento_sgl.offline.reference_updates import Phase, kept_logits

    phases = [Phase(models[name], start) for name, start in composition]
    return [m.position for m in compare(partial(kept_logits, phases)) if m.gap > tie]
