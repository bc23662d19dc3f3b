"""Asking until every item has a usable answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from memento_pipeline.llm.answers import Parsed
from memento_pipeline.llm.paid import Answer, Meter, PaidLlm
from memento_pipeline.llm.wire import Prompt
from memento_sgl.errors import AnswerError, RefusedError

T = TypeVar("T")
R = TypeVar("R")
MakePrompt = Callable[[Sequence[int], str, int], Prompt]
"""(items, note on the earlier answer, number of the attempt) -> prompt"""


async def ask_items(
    llm: PaidLlm,
    meter: Meter,
    wanted: Sequence[int],
    make_prompt: MakePrompt,
    parse: Callable[[str, Sequence[int]], Parsed[T]],
    *,
    tries: int,
) -> dict[int, tuple[T, str]]:
    """Value and model for each item. Only what is missing or unusable is asked again.

    Args:
        tries: answers of this run in a row that may bring nothing new. Stored answers of earlier
            runs are read again for free and do not count, so a retry goes on where it ended.

    Raises:
        AnswerError: there is no usable answer for some items.
        RefusedError: the model or its provider refuses this very question.
    """
    found: dict[int, tuple[T, str]] = {}
    fruitless, attempt, note = 0, 0, ""
    most, limited = len(wanted), True
    while missing := [item for item in wanted if item not in found][:most]:
        prompt = make_prompt(missing, note, attempt)
        answer = await llm.ask(prompt if limited else prompt._replace(limit=None), meter)
        attempt += 1
        if (refusal := _refusal(answer)) is not None:
            if answer.fresh:
                raise RefusedError(f"{prompt.stage}: {refusal}")
            continue  # of an earlier run, which a retry asks again
        parsed = parse(answer.text, missing)
        found |= {item: (value, answer.model) for item, value in parsed.items.items()}
        note = _note(answer, parsed.problems)
        if parsed.items:
            fruitless = 0
            continue
        fruitless += answer.fresh
        if answer.finish_reason == "length":
            # The same question would be cut off at the same place.
            most, limited, smaller = -(-len(missing) // 2), False, len(missing) > 1
            note += ": raise --max-tokens, or the server's context length"
            if answer.fresh and not smaller:
                raise AnswerError(f"{prompt.stage}: {note}")
        if fruitless >= tries:
            raise AnswerError(
                f"{prompt.stage}: no usable answer in {tries} tries; the last: {note}"
            )
    return found


def _refusal(answer: Answer) -> str | None:
    """Why there will be no answer to this question, by the model's or the provider's word."""
    if answer.finish_reason == "refusal":
        return f"the model refused: {' '.join(answer.text.split())[:300]}"
    if answer.finish_reason == "content_filter":
        return "the provider's content filter withheld the answer"
    return None


def _note(answer: Answer, problems: Sequence[str]) -> str:
    note = "; ".join(problems[:3])
    if answer.finish_reason == "length" and problems:
        return f"it was cut off by the token limit ({note})"
    if answer.finish_reason == "reasoning":
        return (
            "the model only reasoned: its answer is empty, or the server took it for reasoning "
            "(see its reasoning parser)"
        )
    return note


async def all_of(parts: Sequence[Coroutine[object, object, R]]) -> list[R]:
    """Run parts of one stage together; all end before the first error, if any, is raised."""
    done = await asyncio.gather(*parts, return_exceptions=True)
    results: list[R] = []
    for result in done:
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results
