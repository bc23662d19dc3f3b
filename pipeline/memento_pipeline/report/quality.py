"""What survives: the facts of a reference that the mementos of a run still hold.

A reference is a JSONL file with one object per trace, `{"id": "...", "facts": ["x = 3", ...]}`:
formulas, numbers and results, written as in the trace, that whoever forgets the blocks will need. A
fact counts as kept when the trace's mementos hold it, token for token; white space and the
delimiters of inline math do not matter. Paraphrases do not count, so this is a lower bound, made
for comparing models and runs and not for judging a single memento.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from memento_pipeline.records import Converted
from memento_sgl.errors import ConfigError

MOST_LOST = 40  # facts that are shown
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|\\?[^\W\d_]+|\S")
_DELIMITERS = {"$", "\\"}


@dataclass(config=ConfigDict(extra="forbid", frozen=True))
class Reference:
    """The facts of one trace."""

    id: str
    facts: tuple[str, ...] = Field(min_length=1)


class Kept(NamedTuple):
    """One model's mementos: facts and tokens."""

    model: str
    traces: int
    facts: int
    kept: int
    memento_tokens: int
    block_tokens: int

    @property
    def recall(self) -> float:
        return self.kept / self.facts

    @property
    def ratio(self) -> float:
        """Memento tokens per block token: keeping all is easy for who shortens nothing."""
        return self.memento_tokens / self.block_tokens


def read_reference(path: Path) -> dict[str, tuple[str, ...]]:
    """Facts by trace id.

    Raises:
        ConfigError: a line is not of the form above, or an id occurs twice.
    """
    adapter, found = TypeAdapter(Reference), dict[str, tuple[str, ...]]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = adapter.validate_json(line)
        except ValidationError as error:
            raise ConfigError(f"{path}:{number}: {error.errors()[0]['msg']}") from None
        if row.id in found:
            raise ConfigError(f"{path}:{number}: the id {row.id!r} occurs twice")
        found[row.id] = row.facts
    if not found:
        raise ConfigError(f"{path} holds no facts")
    return found


def pieces(text: str) -> tuple[str, ...]:
    """A text as tokens to compare by: numbers, words and commands, and single signs."""
    text = re.sub(r"\\[()\[\],;! ]", " ", text)
    return tuple(token for token in _TOKEN.findall(text) if token not in _DELIMITERS)


def holds(text: Sequence[str], fact: Sequence[str]) -> bool:
    """Whether tokens occur in a row."""
    return any(
        text[place : place + len(fact)] == fact for place in range(len(text) - len(fact) + 1)
    )


class Recall:
    """Add every finished trace once; those without facts in the reference are passed over."""

    def __init__(self, reference: dict[str, tuple[str, ...]]) -> None:
        self._left = dict(reference)
        self._by_model: dict[str, Kept] = {}
        self.lost: list[tuple[str, str]] = []  # (trace id, fact), the first ones

    def add(self, done: Converted) -> None:
        """Raises:
        ConfigError: a fact does not occur in its trace, so the reference is of other traces.
        """
        if done.trace.id not in self._left or not done.mementos or done.segmentation is None:
            return
        thought, id_ = pieces(done.trace.thought), done.trace.id
        texts = [pieces(memento.text) for memento in done.mementos]
        kept = 0
        facts = self._left.pop(id_)
        for fact in facts:
            tokens = pieces(fact)
            if not tokens or not holds(thought, tokens):
                raise ConfigError(f"the fact {fact!r} does not occur in the trace {id_!r}")
            if any(holds(text, tokens) for text in texts):
                kept += 1
            elif len(self.lost) < MOST_LOST:
                self.lost.append((id_, fact))
        model = max(memento.made_by for memento in done.mementos)
        known = self._by_model.get(model, Kept(model, 0, 0, 0, 0, 0))
        self._by_model[model] = Kept(
            model,
            known.traces + 1,
            known.facts + len(facts),
            known.kept + kept,
            known.memento_tokens + sum(memento.tokens for memento in done.mementos),
            known.block_tokens + sum(block.tokens for block in done.segmentation.blocks),
        )

    @property
    def unfinished(self) -> int:
        """Traces of the reference of which there are no mementos."""
        return len(self._left)

    @property
    def models(self) -> list[Kept]:
        return sorted(self._by_model.values())


def of_run(traces: Iterable[Converted], reference: dict[str, tuple[str, ...]]) -> Recall:
    """The recall of a whole run."""
    recall = Recall(reference)
    for done in traces:
        recall.add(done)
    return recall
