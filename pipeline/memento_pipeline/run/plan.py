"""What a run would cost, before anything is paid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from memento_pipeline.llm.prompts import score_prompt, system_prompt
from memento_pipeline.read.rows import why_filtered
from memento_pipeline.records import Rejected, Sentences, Trace
from memento_pipeline.run.run_options import RunOptions
from memento_pipeline.stages.rules import forced_scores
from memento_pipeline.stages.score import calls_for, passes
from memento_pipeline.stages.summarize import WHOLE
from memento_pipeline.text.split import split
from memento_pipeline.text.tokens import TokenCounter, count

BLOCK_TOKENS = 1150  # of an average block (paper, section 2)
REFINED = 0.72  # of the mementos fail the first judgement (paper, section 2)
TOKENS_PER_GRADE = 6  # `"123": 1, `
TOKENS_PER_JUDGEMENT = 90
TASK_TOKENS = 350  # of a user message beside blocks and mementos


class Plan(NamedTuple):
    """Expected figures; tokens by the run's tokenizer."""

    traces: int = 0
    left_out: int = 0
    thought_tokens: int = 0
    calls: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0

    def plus(self, other: Plan) -> Plan:
        return Plan(
            self.traces + other.traces,
            self.left_out + other.left_out,
            self.thought_tokens + other.thought_tokens,
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


def plan(options: RunOptions, rows: Iterable[Trace | Rejected], counter: TokenCounter) -> Plan:
    """Read, split and count, but ask nobody. Answers that the folder already holds would be free
    and are counted all the same."""
    total = Plan()
    system = count(counter, system_prompt())
    for row in rows:
        if isinstance(row, Rejected) or why_filtered(row, options.read, counter):
            total = total.plus(Plan(left_out=1))
            continue
        sentences = split(row.thought, counter)
        one = Plan(traces=1, thought_tokens=sum(sentences.tokens))
        if options.endpoints:
            if not (options.read.keep_blocks and row.given_blocks):
                one = one.plus(_scoring(row, sentences, options, counter, system))
            one = one.plus(_mementos(row, one.thought_tokens, options, counter, system))
        total = total.plus(one)
    return total


def _scoring(
    trace: Trace, sentences: Sentences, options: RunOptions, counter: TokenCounter, system: int
) -> Plan:
    forced = forced_scores(trace.thought, sentences)
    unknown = [forced.boundaries[position] for position in forced.unknown]
    tokens = 0
    for part in (part for one in passes(unknown, options.score) for part in one):
        tokens += count(
            counter,
            score_prompt("", trace.thought, sentences, part, problem=trace.problem).user,
        )
    calls = calls_for(len(unknown), options.score)
    times = 2 if options.score.second_window else 1
    return Plan(
        calls=calls,
        prompt_tokens=tokens + calls * system,
        completion_tokens=len(unknown) * TOKENS_PER_GRADE * times,
    )


def _mementos(
    trace: Trace, thought: int, options: RunOptions, counter: TokenCounter, system: int
) -> Plan:
    """Propose, review, and judge what the review improved, as often as the paper's rates say."""
    rules = options.summarize
    blocks = max(1.0, thought / BLOCK_TOKENS)
    calls = -(-thought // rules.call_tokens)
    around = calls * (system + TASK_TOKENS + count(counter, trace.problem))
    mementos = thought * (rules.least_ratio + rules.most_ratio) / 2
    total = Plan(calls=calls, prompt_tokens=around + thought, completion_tokens=mementos)
    share = 1.0  # of the mementos that are graded
    for round_ in range(rules.rounds):
        again = round_ < rules.rounds - 1
        graded = share * blocks * TOKENS_PER_JUDGEMENT
        improved = share * REFINED * mementos if again else 0.0
        shown = thought * (share if share < WHOLE else 1.0) + share * mementos
        total = total.plus(Plan(0, 0, 0, calls, around + shown, graded + improved))
        share *= REFINED
    return total
