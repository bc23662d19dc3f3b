"""Asking OpenAI-compatible endpoints: retries, limits, and knowing when to stop.

Plain httpx instead of the `openai` package: what is retried, how long one whole answer may take and
what counts as an answer is this module's whole job, and the package's models accept bodies without
checking them. What a response means is in `responses`, what an endpoint takes in `wire.Dialect`,
how much may be asked at once in `limits`.

An answer that does not come in time has two causes, and one of them is cured by asking less at
once. A request that was sent beside others counts as an overload and is tried again with fewer; one
that was alone had the whole server: the model is slow, and asking the same again is no use.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx

from memento_pipeline.llm import diagnosis
from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.llm.rate import RateLimit, Slots, backoff, sleep_until
from memento_pipeline.llm.responses import Completion, Failure
from memento_pipeline.llm.wire import Prompt, Server
from memento_sgl.errors import EndpointError, RefusedError

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 10
OVERLOADS_PER_RETRY = 10  # "too many requests" is no fault of the request: more patience
UNUSABLE_AT_FIRST = 5  # responses that are no completion, before any that is: a wrong address
SLOW_IN_A_ROW = 3  # requests, each alone, until a slow model ends the run


class _Tries:
    """What became of the tries of one request so far."""

    def __init__(self, options: AskOptions) -> None:
        self.options = options
        self.failures = self.overloads = self.timeouts = 0
        self.schema = self.limit = True  # may still be sent

    @property
    def count(self) -> int:
        return self.failures + self.overloads

    def add(self, failure: Failure) -> None:
        self.overloads += failure.overload and failure.about != "slow"
        self.failures += not failure.overload or failure.about == "slow"
        self.timeouts += failure.about == "slow"

    def used_up(self, last: Failure) -> bool:
        """Timeouts count by the time they took: eight of them may be a second or an hour."""
        alone = not last.overload
        most, options = self.options.retries, self.options
        lost = self.timeouts * options.timeout
        if lost >= options.give_up_after and self.timeouts >= (2 if alone else 3):
            return True
        return self.failures > most or self.overloads > most * OVERLOADS_PER_RETRY


class Llm:
    """All endpoints of a run, under one set of limits. An async context manager."""

    def __init__(self, endpoints: list[Endpoint], options: AskOptions) -> None:
        self.options = options
        self._servers = [Server(endpoint, options) for endpoint in endpoints]
        self._slots = Slots([server.slot for server in self._servers], options.concurrency)
        rpm, tpm = options.requests_per_minute, options.tokens_per_minute
        self._requests = RateLimit(rpm) if rpm else None
        self._tokens = RateLimit(tpm) if tpm else None
        self._stopped: Exception | None = None
        self._ended = asyncio.Event()  # set when it is stopped
        self._failures = 0  # in a row, over all endpoints
        self._last_success = float("-inf")
        self._deadlines: dict[object, float] = {}  # of the requests in flight
        self.retries = 0
        self.notes: list[str] = []  # what was adapted to an endpoint, in words

    async def __aenter__(self) -> Llm:
        self._last_success = asyncio.get_running_loop().time()
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            await server.close()

    def stop(self, error: Exception) -> None:
        """Start no further request; those in flight may end. The first reason counts."""
        if self._stopped is None:
            self._stopped = error
            self._ended.set()
            self._slots.fail_waiting(error)
            for limit in (self._requests, self._tokens):
                if limit is not None:
                    limit.end()

    @property
    def stopped(self) -> Exception | None:
        return self._stopped

    @property
    def answered(self) -> bool:
        """Whether any request of this run was completed."""
        return any(server.answered for server in self._servers)

    def in_flight(self) -> tuple[int, float]:
        """Requests that are being answered, and seconds until the last of them is given up."""
        now = asyncio.get_running_loop().time()
        return len(self._deadlines), max(0.0, max(self._deadlines.values(), default=now) - now)

    async def complete(
        self, prompt: Prompt, key: str, allow: Callable[[], None] = lambda: None
    ) -> Completion:
        """Ask until there is an answer.

        Args:
            key: sent as Idempotency-Key, the same for all tries, so that a server that knows the
                header does not bill a retry twice.
            allow: called before each try, when it is about to be sent; may raise.

        Raises:
            RefusedError: this request cannot be answered.
            EndpointError: retries are used up, or an endpoint failed for good (the run stops).
            StoppedError: the run was stopped.
        """
        tries = _Tries(self.options)
        while True:
            if self._stopped is not None:
                raise self._stopped
            index = await self._slots.acquire()
            server = self._servers[index]
            body = self._body(server, prompt, tries)
            with_schema = "response_format" in body
            try:
                allow()
                sent = asyncio.get_running_loop().time()
                outcome = await self._try(server, prompt, body, key)
                self._account(server, outcome, sent)
            finally:
                self._slots.release(index)
            if isinstance(outcome, Completion):
                self._learn(server, prompt, outcome, with_schema)
                return outcome
            if outcome.what == "refused":
                if self._adapted(server, prompt, body, outcome, tries):
                    continue
                raise RefusedError(f"{server.endpoint.url} refused the request: {outcome.reason}")
            self.retries += 1
            tries.add(outcome)
            log.warning("try failed", extra={"reason": outcome.reason, "stage": prompt.stage})
            if tries.used_up(outcome):
                raise EndpointError(
                    f"{server.endpoint.url} gave no answer in {tries.count} tries; the last one: "
                    f"{outcome.reason}"
                )
            if not outcome.wait:
                wait = backoff(tries.count, self.options.backoff, self.options.most_backoff)
                await sleep_until(self._ended, wait)

    def _body(self, server: Server, prompt: Prompt, tries: _Tries) -> dict[str, Any]:
        return server.dialect.body(
            prompt, server.endpoint.model, self.options, schema=tries.schema, limit=tries.limit
        )

    def _adapted(
        self, server: Server, prompt: Prompt, sent: dict[str, Any], refusal: Failure, tries: _Tries
    ) -> bool:
        """Whether the request may be sent in another form that the endpoint may take."""
        if self._body(server, prompt, tries) != sent:
            return True  # found out by another request meanwhile
        if (change := server.dialect.adapt(sent, refusal.reason)) is not None:
            self._note(server, change)
            return True
        if tries.limit and "token" in refusal.reason:
            tries.limit = False  # a limit of ours may exceed what the endpoint allows
            if self._body(server, prompt, tries) != sent:
                return True
        if "response_format" in sent and not server.schema_answered:
            tries.schema = False  # maybe it is the schema that it does not take
            return True
        return False

    def _learn(self, server: Server, prompt: Prompt, answer: Completion, with_schema: bool) -> None:
        """An answer without the schema that was refused before, or one with it."""
        server.learn(answer, schema=with_schema)
        if prompt.schema is not None and not with_schema and server.dialect.schemas:
            server.dialect.schemas = False
            self._note(server, "takes no response_format: its answers are parsed strictly instead")

    def _note(self, server: Server, change: str) -> None:
        self.notes.append(f"{server.endpoint.url} {change}")
        log.warning("adapted to an endpoint", extra={"note": self.notes[-1]})

    async def _try(
        self, server: Server, prompt: Prompt, body: dict[str, Any], key: str
    ) -> Completion | Failure:
        estimate = (len(prompt.system) + len(prompt.user)) / 4 + 500
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None:
            await self._tokens.acquire(estimate)
        if self._stopped is not None:
            raise self._stopped
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = server.headers | {"Idempotency-Key": key}
        outcome = await self._send(server, content, headers)
        if isinstance(outcome, Completion):
            self._charge(outcome, estimate)
        return outcome

    async def _send(
        self, server: Server, content: bytes, headers: dict[str, str]
    ) -> Completion | Failure:
        now = asyncio.get_running_loop().time()
        seconds, first = self.options.timeout, self.options.first_timeout
        if server.first_sent is None:
            server.first_sent = now
        left = server.first_sent + first - now  # for the very first response
        if not server.reached:
            seconds = min(seconds, max(0.0, left))
        alone = server.slot.in_flight == 1
        mine = object()
        self._deadlines[mine] = now + seconds
        try:
            async with asyncio.timeout(seconds):
                url = f"{server.endpoint.url}/chat/completions"
                response = await server.post(url, content, headers)
        except TimeoutError:
            if not server.reached and seconds >= left:
                return Failure("fatal", f"sent nothing within {first:g} s", about="silent")
            alone = alone and server.slot.in_flight == 1
            beside = "although nothing else was in flight" if alone else "beside others"
            reason = f"no complete answer within {seconds:g} s {beside}"
            return Failure("again", reason, overload=not alone, about="slow")
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {server.redact(str(error))}"
            never = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            return Failure("fatal" if never and not server.reached else "again", reason)
        finally:
            del self._deadlines[mine]
        server.reached = True
        return server.read(response)

    def _charge(self, answer: Completion, estimate: float) -> None:
        if self._tokens is None or answer.prompt_tokens is None or answer.completion_tokens is None:
            return
        self._tokens.correct(answer.prompt_tokens + answer.completion_tokens - estimate)

    def _account(self, server: Server, outcome: Completion | Failure, sent: float) -> None:
        """Adapt the endpoint's limit, and stop the run when it makes no sense to go on."""
        now = asyncio.get_running_loop().time()
        if isinstance(outcome, Completion):
            server.slot.succeeded((now - sent) / self.options.timeout)
            self._failures, self._last_success = 0, now
            return
        if outcome.about == "unusable" and not server.answered:
            server.unusable += 1
            if server.unusable >= UNUSABLE_AT_FIRST:
                outcome = outcome._replace(what="fatal")
        if outcome.what == "fatal":
            self.stop(diagnosis.failed(server, outcome))
            raise self._stopped or AssertionError("stop() sets the reason")
        if outcome.what == "refused":
            # Before any success one at a time goes on: it may be all requests that are refused.
            server.slot.proven |= server.answered
            return
        server.slot.proven |= outcome.answered and outcome.overload
        self._failures += 1
        if outcome.overload:
            server.slot.overloaded(sent, now)
        else:
            server.slot.failed(now, self.options.backoff, self.options.most_backoff)
        silent = now - self._last_success
        self._stop_if_hopeless(server, outcome, now, silent)

    def _stop_if_hopeless(
        self, server: Server, failure: Failure, now: float, silent: float
    ) -> None:
        give_up = self.options.give_up_after
        if failure.wait is not None:
            if failure.wait > give_up:
                self.stop(diagnosis.down(server, f"it asks to wait {failure.wait:.0f} s"))
            server.slot.pause(now + failure.wait)
        if failure.about == "slow" and not failure.overload:
            server.slow += 1
            if server.slow >= SLOW_IN_A_ROW and silent >= max(give_up, self.options.timeout):
                self.stop(diagnosis.too_slow(server, self.options.timeout))
        if self._failures >= FAILURES_IN_A_ROW and silent >= give_up:
            what = f"{self._failures} failures in a row over {silent:.0f} s, the last one: "
            self.stop(diagnosis.down(server, what + failure.reason))
