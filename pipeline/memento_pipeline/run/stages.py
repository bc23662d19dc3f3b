"""The four stages of a trace, with a model or by rules. Nothing here knows the store."""

from __future__ import annotations

import asyncio

from memento_pipeline import RULES
from memento_pipeline.llm.paid import Meter, PaidLlm
from memento_pipeline.read.rows import why_filtered
from memento_pipeline.records import (
    Block,
    BoundaryScores,
    Memento,
    Record,
    Segmentation,
    Sentences,
    Trace,
)
from memento_pipeline.run.run_options import RunOptions
from memento_pipeline.stages.checks import check_memento
from memento_pipeline.stages.relax import cut_thought
from memento_pipeline.stages.rules import extract_memento, forced_scores, rule_scores
from memento_pipeline.stages.score import score_boundaries
from memento_pipeline.stages.segment import keep_blocks
from memento_pipeline.stages.summarize import gate, make_mementos
from memento_pipeline.text.split import split
from memento_pipeline.text.tokens import TokenCounter, count


class Mementos(Record):
    """Result of the summarize stage."""

    mementos: tuple[Memento, ...]


RESULTS: dict[str, type[Record]] = {
    "split": Sentences,
    "score": BoundaryScores,
    "segment": Segmentation,
    "summarize": Mementos,
}


class Stages:
    """What a run does with one trace.

    Args:
        llm: None for the offline baseline.
    """

    def __init__(self, options: RunOptions, counter: TokenCounter, llm: PaidLlm | None) -> None:
        self._options = options
        self._counter = counter
        self._llm = llm

    def filtered(self, trace: Trace) -> str | None:
        """Why the trace is left out before any work; None when it is not."""
        return why_filtered(trace, self._options.read, self._counter)

    def read(self, stage: str, result: str) -> Record:
        """A stored result."""
        return RESULTS[stage].model_validate_json(result)

    async def do(self, stage: str, trace: Trace, done: dict[str, Record], meter: Meter) -> Record:
        """Carry out a stage; `done` holds the results of those before it."""
        if stage == "split":
            # Threads, so that a long trace does not hold up the answers of the others.
            if self._keeps(trace):
                ends = [block.end for block in trace.given_blocks]
                return await asyncio.to_thread(split, trace.thought, self._counter, ends)
            return await asyncio.to_thread(split, trace.thought, self._counter)
        sentences = done["split"]
        assert isinstance(sentences, Sentences)
        if stage == "score":
            return await self._score(trace, sentences, meter)
        if stage == "segment":
            scores = done["score"]
            assert isinstance(scores, BoundaryScores)
            if self._keeps(trace):
                penalty = self._options.segment.penalty
                return keep_blocks(sentences, scores, trace.given_blocks, penalty)
            return await asyncio.to_thread(
                cut_thought, trace.thought, sentences, scores, self._options.segment, self._counter
            )
        segmentation = done["segment"]
        assert isinstance(segmentation, Segmentation)
        return Mementos(mementos=await self._summarize(trace, done, segmentation.blocks, meter))

    def _keeps(self, trace: Trace) -> bool:
        """Whether the blocks that the row came with stay."""
        return self._options.read.keep_blocks and bool(trace.given_blocks)

    async def _score(self, trace: Trace, sentences: Sentences, meter: Meter) -> BoundaryScores:
        if self._llm is None or self._keeps(trace):  # nobody pays for grades that decide nothing
            return await asyncio.to_thread(rule_scores, trace.thought, sentences)
        forced = await asyncio.to_thread(forced_scores, trace.thought, sentences)
        options = self._options.score
        return await score_boundaries(trace, sentences, forced, self._llm, meter, options)

    async def _summarize(
        self, trace: Trace, done: dict[str, Record], blocks: tuple[Block, ...], meter: Meter
    ) -> tuple[Memento, ...]:
        if self._llm is None:
            return await asyncio.to_thread(self._by_rules, trace, blocks)
        options, sentences, scores = self._options.summarize, done["split"], done["score"]
        assert isinstance(sentences, Sentences)
        assert isinstance(scores, BoundaryScores)
        return await make_mementos(
            trace,
            sentences,
            scores,
            blocks,
            self._llm,
            meter,
            options,
            check_memento,
            self._count,
        )

    def _by_rules(self, trace: Trace, blocks: tuple[Block, ...]) -> tuple[Memento, ...]:
        mementos = []
        for block in blocks:
            text = block.text(trace.thought)
            memento = extract_memento(text, self._counter)
            mementos.append(
                Memento(
                    text=memento,
                    tokens=self._count(memento),
                    judge_score=None,
                    passed=not check_memento(text, memento),
                    made_by=RULES,
                )
            )
        return tuple(mementos)

    def _count(self, text: str) -> int:
        return count(self._counter, text)

    def verdict(self, trace: Trace, done: dict[str, Record]) -> str | None:
        """Why the finished trace is not good enough; None when it is."""
        segmentation, made = done["segment"], done["summarize"]
        assert isinstance(segmentation, Segmentation)
        assert isinstance(made, Mementos)
        if not segmentation.blocks:
            return "the thought is empty"
        problems = [
            check_memento(block.text(trace.thought), memento.text)
            for block, memento in zip(segmentation.blocks, made.mementos, strict=True)
        ]
        return gate(segmentation.blocks, made.mementos, problems, self._options.summarize)
