"""Stage 5: a memento for every block: propose, judge, refine, keep the best.

One call proposes all mementos of a trace with the whole trace in view; one reviews them: it grades
each and at once improves those that fall short; one judges what was improved, with only the blocks
of those in view. The paper's defaults: below 8 of 10 a memento is refined, the judge is asked at
most twice (more rounds make mementos longer), 28 % pass at first and 92 % in the end.

Grading and improving in one call reads the trace once instead of twice. What a review grades low
but does not improve is refined by a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import Field

from memento_pipeline.llm.answers import (
    Judgement,
    Parsed,
    Review,
    parse_judgements,
    parse_mementos,
    parse_reviews,
)
from memento_pipeline.llm.asking import all_of, ask_items
from memento_pipeline.llm.paid import Meter, PaidLlm
from memento_pipeline.llm.prompts import BlockView, marked, memento_prompt, nonce_for
from memento_pipeline.llm.wire import Prompt
from memento_pipeline.records import (
    Attempt,
    Block,
    BoundaryScores,
    Memento,
    Record,
    Sentences,
    Trace,
)

T = TypeVar("T")
WHOLE = 0.9  # of a trace's tokens: who asks about as much sees all of it
Check = Callable[[str, str], tuple[str, ...]]
"""(block text, memento) -> problems that a program can see"""
Count = Callable[[str], int]
"""tokens of a text"""


class SummarizeOptions(Record):
    """How mementos are made, and which traces are good enough to keep."""

    rounds: int = Field(default=2, ge=0)  # of the judge; 0: propose only
    threshold: float = Field(default=8.0, ge=0, le=10)  # a memento below is refined
    least_ratio: float = Field(
        default=0.15, gt=0, le=1
    )  # memento tokens per block token asked for (paper)
    most_ratio: float = Field(default=0.25, gt=0, le=1)
    call_tokens: int = Field(default=60_000, ge=1000)  # block tokens shown in one call
    tries: int = Field(default=5, ge=1)

    gate_mean: float = Field(default=8.0, ge=0, le=10)  # mean judge score of a trace
    gate_least: float = Field(default=6.0, ge=0, le=10)  # worst judge score of a trace
    gate_ratio: float = Field(default=0.5, gt=0)  # memento tokens per block token of a trace
    gate_problems: bool = True  # leave out traces with a memento that fails the checks


class _Candidate:
    """The attempts at one block's memento."""

    def __init__(self, number: int, block: Block, text: str) -> None:
        self.number = number
        self.block = block
        self.text = text
        self.attempts: list[Attempt] = []
        self.models: list[str] = []

    def add(self, memento: str, model: str, check: Check) -> None:
        self.attempts.append(
            Attempt(text=memento, judge_score=None, problems=check(self.text, memento))
        )
        self.models.append(model)

    def judged(self, judgement: Judgement) -> None:
        update = {"judge_score": judgement.score, "feedback": judgement.feedback}
        self.attempts[-1] = self.attempts[-1].model_copy(update=update)

    def passes(self, index: int, threshold: float) -> bool:
        attempt = self.attempts[index]
        score = attempt.judge_score
        return not attempt.problems and (score is None or score >= threshold)

    def best(self, threshold: float) -> int:
        """The attempt to keep: one that passes before one that does not, then by score less a
        point per problem, then the earlier one."""

        def rank(index: int) -> tuple[bool, float, int]:
            attempt = self.attempts[index]
            score = (attempt.judge_score or 0.0) - len(attempt.problems)
            return self.passes(index, threshold), score, -index

        return max(range(len(self.attempts)), key=rank)


class _Maker:
    """One trace while its mementos are made."""

    def __init__(
        self,
        trace: Trace,
        sentences: Sentences,
        scores: BoundaryScores,
        blocks: Sequence[Block],
        llm: PaidLlm,
        meter: Meter,
        options: SummarizeOptions,
        check: Check,
    ) -> None:
        self.trace = trace
        self.sentences = sentences
        # The cuts that the questions for grades numbered, so that both begin alike.
        asked = zip(scores.boundaries, scores.decided_by, strict=True)
        ends = {block.last_sentence for block in blocks}
        self.marks = sorted({boundary for boundary, by in asked if by == "llm"} | ends)
        self.options = options
        self.check = check
        self.candidates = [
            _Candidate(number, block, block.text(trace.thought))
            for number, block in enumerate(blocks, 1)
        ]
        self._llm, self._meter = llm, meter
        self._nonce = nonce_for(trace.problem, trace.thought)

    async def propose(self) -> None:
        await self._write("summarize", self.candidates)

    async def judge(self) -> None:
        """Have the newest attempts judged that are not yet."""
        asked = self._unjudged()
        judgements = await self._ask("judge", asked, parse_judgements)
        for candidate in asked:
            candidate.judged(judgements[candidate.number][0])

    async def review(self) -> bool:
        """Have them judged and those that do not pass improved; False when all pass."""

        def parse(text: str, wanted: Sequence[int]) -> Parsed[Review]:
            return parse_reviews(text, wanted, self._nonce)

        asked = self._unjudged()
        reviews = await self._ask("review", asked, parse)
        for candidate in asked:
            candidate.judged(reviews[candidate.number][0].judgement)
        failing = self._failing()
        rest: list[_Candidate] = []
        for candidate in failing:
            review, model = reviews.get(candidate.number, (None, ""))
            if review is None or review.improved is None:
                rest.append(candidate)
            else:
                candidate.add(review.improved, model, self.check)
        await self._write("refine", rest)
        return bool(failing)

    def _unjudged(self) -> list[_Candidate]:
        return [c for c in self.candidates if c.attempts[-1].judge_score is None]

    def _failing(self) -> list[_Candidate]:
        threshold = self.options.threshold
        return [c for c in self.candidates if not c.passes(c.best(threshold), threshold)]

    async def _write(self, stage: str, asked: Sequence[_Candidate]) -> None:
        # A refined memento is checked against the nonce too: it must not repeat a tag.
        def parse(text: str, wanted: Sequence[int]) -> Parsed[str]:
            return parse_mementos(text, wanted, self._nonce)

        mementos = await self._ask(stage, asked, parse)
        for candidate in asked:
            candidate.add(*mementos[candidate.number], self.check)

    async def _ask(
        self,
        stage: str,
        asked: Sequence[_Candidate],
        parse: Callable[[str, Sequence[int]], Parsed[T]],
    ) -> dict[int, tuple[T, str]]:
        groups = self._groups(asked)
        parts = [self._ask_group(stage, shown, part, parse) for shown, part in groups]
        return {item: value for answer in await all_of(parts) for item, value in answer.items()}

    async def _ask_group(
        self,
        stage: str,
        shown: Sequence[_Candidate],
        asked: Sequence[_Candidate],
        parse: Callable[[str, Sequence[int]], Parsed[T]],
    ) -> dict[int, tuple[T, str]]:
        views = {c.number: self._view(c, stage) for c in shown}
        excerpt = "" if shown is asked else self._excerpt(shown)
        if excerpt:
            views = {c.number: views[c.number]._replace(where=_where(c, shown)) for c in shown}

        def prompt(wanted: Sequence[int], note: str, attempt: int) -> Prompt:
            return memento_prompt(
                stage,
                self.trace.id,
                self.trace.problem,
                [] if excerpt else [views[number] for number in wanted],
                [views[number] for number in wanted],
                nonce=self._nonce,
                excerpt=excerpt,
                threshold=self.options.threshold,
                note=note,
                attempt=attempt,
            )

        numbers = [c.number for c in asked]
        tries = self.options.tries
        return await ask_items(self._llm, self._meter, numbers, prompt, parse, tries=tries)

    def _groups(
        self, asked: Sequence[_Candidate]
    ) -> list[tuple[Sequence[_Candidate], Sequence[_Candidate]]]:
        """What to show and what to ask in each call.

        The whole trace is shown where it fits: the model sees the context, and a prefix cache has
        it already. When noticeably less is asked about, only that is shown (then both are one).
        """
        groups: list[list[_Candidate]] = [[]]
        for candidate in self.candidates:
            size = sum(c.block.tokens for c in groups[-1])
            if groups[-1] and size + candidate.block.tokens > self.options.call_tokens:
                groups.append([])
            groups[-1].append(candidate)
        result: list[tuple[Sequence[_Candidate], Sequence[_Candidate]]] = []
        for shown in groups:
            part = [c for c in shown if c in asked]
            tokens, all_ = (sum(c.block.tokens for c in group) for group in (part, shown))
            few = tokens < WHOLE * all_
            if part:
                result.append((part if few else shown, part))
        return result

    def _excerpt(self, shown: Sequence[_Candidate]) -> str:
        first, last = shown[0].block.first_sentence, shown[-1].block.last_sentence
        return marked(self.trace.thought, self.sentences, self.marks, first, last)

    def _view(self, candidate: _Candidate, stage: str) -> BlockView:
        options = self.options
        view = BlockView(
            number=candidate.number,
            text=candidate.text,
            least=max(1, round(candidate.block.tokens * options.least_ratio)),
            most=max(10, round(candidate.block.tokens * options.most_ratio)),
        )
        if stage == "summarize":
            return view
        index = candidate.best(options.threshold) if stage == "refine" else -1
        attempt = candidate.attempts[index]
        if stage != "refine":
            return view._replace(candidate=attempt.text, feedback="\n".join(attempt.problems))
        remarks = [attempt.feedback, *attempt.problems]
        feedback = "\n".join(remark for remark in remarks if remark)
        return view._replace(candidate=attempt.text, feedback=feedback or "Make it more complete.")


def _where(candidate: _Candidate, shown: Sequence[_Candidate]) -> str:
    """Between which cuts of the shown text a block lies."""
    start = f"⟦{candidate.block.first_sentence - 1}⟧" if candidate is not shown[0] else "the start"
    end = f"⟦{candidate.block.last_sentence}⟧" if candidate is not shown[-1] else "the end"
    return f"{start} to {end}"


async def make_mementos(
    trace: Trace,
    sentences: Sentences,
    scores: BoundaryScores,
    blocks: Sequence[Block],
    llm: PaidLlm,
    meter: Meter,
    options: SummarizeOptions,
    check: Check,
    count: Count,
) -> tuple[Memento, ...]:
    """The best memento of each block that the rounds allow, with all attempts.

    Raises:
        AnswerError, EndpointError, StoppedError: nothing is made up, the stage is not done.
    """
    maker = _Maker(trace, sentences, scores, blocks, llm, meter, options, check)
    await maker.propose()
    for _ in range(options.rounds - 1):
        if not await maker.review():
            break
    else:
        if options.rounds:  # what the last round judges is final: nothing unjudged is kept
            await maker.judge()
    return tuple(_kept(candidate, options.threshold, count) for candidate in maker.candidates)


def _kept(candidate: _Candidate, threshold: float, count: Count) -> Memento:
    index = candidate.best(threshold)
    attempt = candidate.attempts[index]
    return Memento(
        text=attempt.text,
        tokens=count(attempt.text),
        judge_score=attempt.judge_score,
        feedback=attempt.feedback,
        history=tuple(candidate.attempts),
        passed=candidate.passes(index, threshold),
        made_by=candidate.models[index],
    )


def gate(
    blocks: Sequence[Block],
    mementos: Sequence[Memento],
    check_problems: Sequence[tuple[str, ...]],
    options: SummarizeOptions,
) -> str | None:
    """Why a trace with these mementos is not good enough to train on; None when it is."""
    scores = [m.judge_score for m in mementos if m.judge_score is not None]
    if scores and min(scores) < options.gate_least:
        number = 1 + [m.judge_score for m in mementos].index(min(scores))
        return f"memento {number} scored {min(scores):g}, less than {options.gate_least:g}"
    if scores and sum(scores) / len(scores) < options.gate_mean:
        mean = sum(scores) / len(scores)
        return f"mementos scored {mean:.2f} on average, less than {options.gate_mean:g}"
    ratio = sum(m.tokens for m in mementos) / max(1, sum(b.tokens for b in blocks))
    if ratio > options.gate_ratio:
        return f"mementos are {ratio:.0%} of the blocks, more than {options.gate_ratio:.0%}"
    if options.gate_problems:
        for number, problems in enumerate(check_problems, 1):
            if problems:
                return f"memento {number}: {problems[0]}"
    return None
