"""Asking OpenAI-compatible endpoints: retries, limits, and knowing when to stop.

Plain httpx instead of the `openai` package: what is retried, how long one whole answer may take and
what counts as an answer is this module's whole job, and the package's models accept bodies without
checking them.

    malformed body, 408, 409, 425, 429, 5xx, timeout, broken connection   tried again
    401, 402, exhausted quota, redirect; 403, 404 before any success,
    no connection before any response                                     the run stops
    other 4xx                                                             the trace fails
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import httpx

from memento_pipeline.endpoints import AskOptions, Endpoint
from memento_pipeline.limits import RateLimit, Slots, backoff, sleep_until
from memento_pipeline.wire import Completion, Failure, Prompt, Server
from memento_sgl.errors import EndpointError, RefusedError, StoppedError

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 10
OVERLOADS_PER_RETRY = 10  # "too many requests" is no fault of the request: more patience


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
        self.retries = 0

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
        failures, overloads, schema = 0, 0, True
        while True:
            if self._stopped is not None:
                raise self._stopped
            index = await self._slots.acquire()
            server = self._servers[index]
            with_schema = schema and server.schemas and prompt.schema is not None
            try:
                allow()
                sent = asyncio.get_running_loop().time()
                outcome = await self._try(server, prompt, key, with_schema)
                self._account(server, outcome, sent)
            finally:
                self._slots.release(index)
            if isinstance(outcome, Completion):
                self._learn(server, prompt, with_schema)
                return outcome
            if outcome.what == "refused":
                if with_schema and not server.schema_answered:
                    schema = False  # maybe it is the schema that it does not take
                    continue
                raise RefusedError(f"{server.endpoint.url} refused the request: {outcome.reason}")
            overloads += outcome.overload
            failures += not outcome.overload
            self.retries += 1
            log.warning("try failed", extra={"reason": outcome.reason, "stage": prompt.stage})
            most = self.options.retries
            if failures > most or overloads > most * OVERLOADS_PER_RETRY:
                raise EndpointError(
                    f"{server.endpoint.url} gave no answer in {failures + overloads} tries; the "
                    f"last one: {outcome.reason}"
                )
            if not outcome.wait:
                tries = failures + overloads
                wait = backoff(tries, self.options.backoff, self.options.most_backoff)
                await sleep_until(self._ended, wait)

    @staticmethod
    def _learn(server: Server, prompt: Prompt, with_schema: bool) -> None:
        """An answer without the schema that was refused before, or one with it."""
        server.answered = True
        server.schema_answered |= with_schema
        if prompt.schema is not None and not with_schema and server.schemas:
            server.schemas = False
            log.warning(
                "endpoint takes no response_format: its answers are parsed strictly instead",
                extra={"endpoint": server.endpoint.url},
            )

    async def _try(
        self, server: Server, prompt: Prompt, key: str, schema: bool
    ) -> Completion | Failure:
        estimate = (len(prompt.system) + len(prompt.user)) / 4 + 500
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None:
            await self._tokens.acquire(estimate)
        if self._stopped is not None:
            raise self._stopped
        body = server.body(prompt, self.options, schema)
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = server.headers | {"Idempotency-Key": key}
        url = f"{server.endpoint.url}/chat/completions"
        try:
            async with asyncio.timeout(self.options.timeout):
                response = await server.post(url, content, headers)
        except TimeoutError:
            reason = f"no complete answer within {self.options.timeout:g} s"
            return Failure("again", reason, overload=True)
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {server.redact(str(error))}"
            never = isinstance(error, httpx.ConnectError) and not server.reached
            return Failure("fatal" if never else "again", reason)
        server.reached = True
        outcome = server.read(response)
        if isinstance(outcome, Completion):
            self._charge(outcome, estimate)
        return outcome

    def _charge(self, answer: Completion, estimate: float) -> None:
        if self._tokens is None or answer.prompt_tokens is None or answer.completion_tokens is None:
            return
        self._tokens.correct(answer.prompt_tokens + answer.completion_tokens - estimate)

    def _account(self, server: Server, outcome: Completion | Failure, sent: float) -> None:
        """Adapt the endpoint's limit, and stop the run when it makes no sense to go on."""
        now = asyncio.get_running_loop().time()
        if isinstance(outcome, Completion):
            server.slot.succeeded()
            self._failures, self._last_success = 0, now
            return
        if outcome.what == "fatal":
            self.stop(self._diagnosis(server, outcome))
            raise self._stopped or AssertionError("stop() sets the reason")
        server.slot.proven |= outcome.answered and (outcome.what == "refused" or outcome.overload)
        if outcome.what == "refused":
            return
        self._failures += 1
        if outcome.overload:
            server.slot.overloaded(sent, now)
        else:
            server.slot.failed(now, self.options.backoff, self.options.most_backoff)
        if outcome.wait is not None:
            if outcome.wait > self.options.give_up_after:
                self.stop(_down(server, f"it asks to wait {outcome.wait:.0f} s"))
            server.slot.pause(now + outcome.wait)
        silent = now - self._last_success
        if self._failures >= FAILURES_IN_A_ROW and silent >= self.options.give_up_after:
            what = f"{self._failures} failures in a row over {silent:.0f} s, the last one: "
            self.stop(_down(server, what + outcome.reason))

    def _diagnosis(self, server: Server, failure: Failure) -> EndpointError:
        endpoint = server.endpoint
        if not server.reached:
            return EndpointError(
                f"{endpoint.url} cannot be reached ({failure.reason}): start the server or correct "
                "the address, then run the command again to resume"
            )
        if server.key is None:
            key = f"no key was sent: set the environment variable {endpoint.variable}"
        else:
            key = f"check the key in the environment variable {endpoint.variable}"
        return EndpointError(
            f"{endpoint.url} refused the request ({failure.reason}): {key}. The address and the "
            f"model name {endpoint.model!r} must be right too. Nothing was made up; run the "
            "command again to resume"
        )


def _down(server: Server, why: str) -> StoppedError:
    return StoppedError(
        f"{server.endpoint.url} is down or overloaded ({why}). What was done is kept; run the "
        "command again to resume"
    )
