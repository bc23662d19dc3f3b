"""What the report counts over a whole run: exact, and bounded by the number of distinct values."""

from __future__ import annotations

from collections import Counter

from memento_pipeline.output.stats import PASS_SCORE, reason_kind
from memento_pipeline.records import Converted, Memento


class Distribution:
    """How often each value occurred."""

    def __init__(self) -> None:
        self.values: Counter[float] = Counter()

    def add(self, value: float) -> None:
        self.values[value] += 1

    @property
    def count(self) -> int:
        return self.values.total()

    @property
    def mean(self) -> float | None:
        total = sum(value * times for value, times in self.values.items())
        return total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The smallest value that `share` of all values do not exceed."""
        seen = 0
        for value in sorted(self.values):
            seen += self.values[value]
            if seen >= share * self.count:
                return value
        return None

    def share(self, least: float) -> float | None:
        """Part of the values that are `least` or more."""
        good = sum(times for value, times in self.values.items() if value >= least)
        return good / self.count if self.count else None


class Tally:
    """Add every finished trace once.

    Sizes cover all traces that have blocks or mementos, also those that the quality gate left out:
    figures of the kept ones alone would flatter.
    """

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.makers: Counter[str] = Counter()
        self.tokenizers: Counter[str] = Counter()
        self.sentence_edges = Distribution()
        self.candidates = Distribution()
        self.blocks = Distribution()
        self.block_tokens = Distribution()
        self.memento_tokens = Distribution()
        self.percent = Distribution()  # memento tokens per 100 block tokens, by block
        self.first_scores = Distribution()
        self.last_scores = Distribution()
        self.attempts = Distribution()
        self.calls = Distribution()  # of traces that asked a model
        self.read_again = Distribution()  # tokens paid per thought token, by trace
        self.unreported_traces = 0  # asked a model, tokens unknown
        self._compressed = [0, 0]  # memento tokens, tokens of their blocks

    @property
    def ratio(self) -> float | None:
        """All memento tokens per token of the blocks they stand for."""
        mementos, blocks = self._compressed
        return mementos / blocks if blocks else None

    @property
    def pass_first(self) -> float | None:
        return self.first_scores.share(PASS_SCORE)

    @property
    def pass_last(self) -> float | None:
        return self.last_scores.share(PASS_SCORE)

    def add(self, done: Converted) -> None:
        self.statuses[done.status.value] += 1
        if done.reason is not None:
            self.reasons[done.status.value, reason_kind(done.reason)] += 1
        if done.sentences is not None:
            self.tokenizers[done.sentences.tokenizer] += 1
            self.sentence_edges.add(max(len(done.sentences) - 1, 0))
            self.candidates.add(len(done.sentences.candidates))
        blocks = done.segmentation.blocks if done.segmentation else ()
        if blocks:
            self.blocks.add(len(blocks))
        for block in blocks:
            self.block_tokens.add(block.tokens)
        for block, memento in zip(blocks, done.mementos, strict=False):
            self._compressed[0] += memento.tokens
            self._compressed[1] += block.tokens
            if block.tokens:
                self.percent.add(round(100 * memento.tokens / block.tokens))
            self._memento(memento)
        self._usage(done)

    def _memento(self, memento: Memento) -> None:
        self.makers[memento.made_by] += 1
        self.memento_tokens.add(memento.tokens)
        if memento.judge_score is None:
            return
        first = memento.history[0].judge_score if memento.history else memento.judge_score
        if first is not None:
            self.first_scores.add(first)
            self.last_scores.add(memento.judge_score)
            self.attempts.add(max(len(memento.history), 1))

    def _usage(self, done: Converted) -> None:
        if not done.usage.calls or not done.mementos or done.sentences is None:
            return
        self.calls.add(done.usage.calls)
        spent = (done.usage.prompt_tokens, done.usage.completion_tokens)
        if spent[0] is None or spent[1] is None:
            self.unreported_traces += 1
        else:
            thought = sum(done.sentences.tokens)
            self.read_again.add(round((spent[0] + spent[1]) / thought, 2))
