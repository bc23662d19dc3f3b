"""Answers that are paid once: the request cache, the budget, and who paid what."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

from memento_pipeline.llm.client import Llm
from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.llm.wire import Completion, Prompt
from memento_pipeline.records import Usage
from memento_pipeline.store.folder import Store
from memento_pipeline.store.schema import Spent, StoredAnswer
from memento_sgl.errors import ConfigError, StoppedError

N = TypeVar("N", int, float)

CHARACTERS_PER_TOKEN = 3
GUESSED_COMPLETION = 2000  # tokens, for reserving budget before an answer is there


class Answer(NamedTuple):
    text: str
    model: str
    finish_reason: str | None
    fresh: bool  # asked in this run, not taken from the cache


class _NotYetError(Exception):
    """The budget is reserved by calls in flight, which may turn out cheaper."""


class Meter:
    """Adds up what one stage of one trace cost."""

    def __init__(self) -> None:
        self._paid: list[StoredAnswer] = []
        self._cached = 0

    def add(self, answer: StoredAnswer, trace_id: str) -> None:
        """Count an answer: as a call if this trace paid it (now or before a restart), else as a
        cached one."""
        if answer.trace_id == trace_id:
            self._paid.append(answer)
        else:
            self._cached += 1

    @property
    def usage(self) -> Usage:
        if not self._paid:
            return Usage(
                cached_calls=self._cached,
                prompt_tokens=0,
                completion_tokens=0,
                cached_tokens=0,
                dollars=0,
            )
        return Usage(
            calls=len(self._paid),
            cached_calls=self._cached,
            prompt_tokens=_sum([a.prompt_tokens for a in self._paid]),
            completion_tokens=_sum([a.completion_tokens for a in self._paid]),
            cached_tokens=_sum([a.cached_tokens for a in self._paid]),
            dollars=_sum([a.dollars for a in self._paid]),
        )


def _sum(values: Sequence[N | None]) -> N | None:
    """The sum, or None when a part of it is unknown."""
    known = [value for value in values if value is not None]
    return sum(known[1:], known[0]) if len(known) == len(values) else None


async def all_done(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait until all tasks have ended, those that join meanwhile too.

    A task that has ended may stay in the collection: Ctrl-C can come in the middle of the callback
    that takes it out.
    """
    while pending := [task for task in tasks if not task.done()]:
        await asyncio.wait(pending)


class PaidLlm:
    """`Llm` behind the store: an answer is durable before anybody sees it, and never paid twice.

    The key of a request covers all that decides its answer: the prompts, the schema, the sampling
    options, the run's models and the number of the attempt. It does not cover the address, so a
    cached answer holds when a server moves. Two traces that ask the same at the same time share
    one call.

    Raises:
        ConfigError: a budget without prices.
    """

    def __init__(
        self, store: Store, llm: Llm, endpoints: Sequence[Endpoint], options: AskOptions
    ) -> None:
        if options.budget is not None and None in (options.price_in, options.price_out):
            raise ConfigError("--budget needs --price-in and --price-out (dollars per 1M tokens)")
        self._store = store
        self.llm = llm
        self._options = options
        self._models = sorted({endpoint.model for endpoint in endpoints})
        self._asking: dict[str, asyncio.Task[StoredAnswer]] = {}
        self._reserved: dict[str, float] = {}  # dollars of each call in flight, by key
        self._settled = asyncio.Event()  # set, and replaced, when one of them ends
        self.spent = store.spent()

    def key(self, prompt: Prompt) -> str:
        decides = [
            # Not the limit: it only ever cuts off what nobody can use.
            *(prompt.system, prompt.user, prompt.schema, prompt.attempt),
            *(self._options.sampling(), self._options.structured, self._models),
        ]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    async def ask(self, prompt: Prompt, meter: Meter) -> Answer:
        """The answer to a prompt, from the store or from an endpoint.

        Raises:
            EndpointError, StoppedError, StoreError: there is none.
        """
        key = self.key(prompt)
        stored, fresh = self._store.answer(key), False
        if stored is None:
            task = self._asking.get(key)
            if task is None:
                task = asyncio.create_task(self._pay(prompt, key))
                self._asking[key] = task
                task.add_done_callback(lambda done: self._forget(key, done))
            # Shielded: who waits may be cancelled, a paid answer is still stored.
            stored, fresh = await asyncio.shield(task), True
        meter.add(stored, prompt.trace_id)
        return Answer(stored.text, stored.model, stored.finish_reason, fresh)

    def _forget(self, key: str, done: asyncio.Task[StoredAnswer]) -> None:
        del self._asking[key]
        if not done.cancelled():
            done.exception()  # seen by every waiter; there may be none left

    async def drain(self) -> None:
        """Wait for the calls in flight, so that their answers are stored."""
        await all_done(self._asking.values())

    async def _pay(self, prompt: Prompt, key: str) -> StoredAnswer:
        def allow() -> None:
            # Reserved when sent, not when queued: what waits costs nothing yet.
            if key not in self._reserved:
                self._reserved[key] = self._estimate(prompt)

        try:
            done = await self._complete(prompt, key, allow)
            answer = self._stored(prompt, key, done)
            await self._store.keep_answer(answer)
            self._count(answer)
        finally:
            self._reserved.pop(key, None)  # until here the money is spent but not counted
            self._settled.set()
            self._settled = asyncio.Event()
        return answer

    async def _complete(self, prompt: Prompt, key: str, allow: Callable[[], None]) -> Completion:
        while True:
            settled = self._settled
            try:
                return await self.llm.complete(prompt, key, allow)
            except _NotYetError:
                await settled.wait()

    def _stored(self, prompt: Prompt, key: str, done: Completion) -> StoredAnswer:
        return StoredAnswer(
            key=key,
            trace_id=prompt.trace_id,
            stage=prompt.stage,
            model=done.model,
            text=done.text,
            finish_reason=done.finish_reason,
            prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens,
            dollars=self._options.dollars(
                done.prompt_tokens, done.completion_tokens, done.cached_tokens
            ),
            cached_tokens=done.cached_tokens,
        )

    def _count(self, answer: StoredAnswer) -> None:
        spent = self.spent
        unknown = answer.prompt_tokens is None or answer.completion_tokens is None
        self.spent = Spent(
            answers=spent.answers + 1,
            unknown=spent.unknown + unknown,
            prompt_tokens=spent.prompt_tokens + (answer.prompt_tokens or 0),
            completion_tokens=spent.completion_tokens + (answer.completion_tokens or 0),
            dollars=spent.dollars + (answer.dollars or 0.0),
        )

    def _estimate(self, prompt: Prompt) -> float:
        """Dollars that the call may cost.

        Raises:
            StoppedError: the budget does not allow it; the run stops.
            _NotYetError: it may allow it when calls in flight have ended.
        """
        budget = self._options.budget
        if budget is None:
            return 0.0
        if self.spent.unknown:
            self._stop(
                "the endpoint does not report its token usage, so a budget cannot be kept: run "
                "without --budget or with another endpoint"
            )
        tokens_in = (len(prompt.system) + len(prompt.user)) // CHARACTERS_PER_TOKEN
        tokens_out = self._options.max_tokens or prompt.limit or GUESSED_COMPLETION
        estimate = self._options.dollars(tokens_in, tokens_out) or 0.0
        if self.spent.dollars + sum(self._reserved.values()) + estimate > budget:
            if self._reserved:
                raise _NotYetError
            self._stop(
                f"the budget of ${budget:g} is used up (${self.spent.dollars:.4f} spent, the next "
                f"call may cost ${estimate:.4f}): raise --budget and run the command again to "
                "resume"
            )
        return estimate

    def _stop(self, why: str) -> None:
        error = StoppedError(why)
        self.llm.stop(error)
        raise error
