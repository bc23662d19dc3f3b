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
from typing import Any, Literal, NamedTuple

import httpx
from pydantic import BaseModel, Field, ValidationError

from memento_pipeline.endpoints import AskOptions, Endpoint
from memento_pipeline.limits import RateLimit, Slot, Slots, backoff, retry_after
from memento_sgl.errors import EndpointError, RefusedError, StoppedError

log = logging.getLogger(__name__)

FATAL = {401, 402}
FATAL_AT_FIRST = {403, 404}  # later they may be about one request (moderation)
AGAIN = {408, 409, 425, 429}
FAILURES_IN_A_ROW = 20
OVERLOADS_PER_RETRY = 10  # "too many requests" is no fault of the request: more patience
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=30)


class Schema(NamedTuple):
    """A JSON schema that the answer should follow, where the endpoint can enforce one."""

    name: str
    schema: dict[str, Any]


class Prompt(NamedTuple):
    """One question. `attempt` counts the askings of the same text: it makes their keys differ."""

    trace_id: str
    stage: str
    system: str
    user: str
    schema: Schema | None = None
    attempt: int = 0


class Completion(NamedTuple):
    """What an endpoint answered; counts are None where it does not report them."""

    text: str
    model: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Failure(NamedTuple):
    what: Literal["again", "refused", "fatal"]
    reason: str
    wait: float | None = None  # seconds, by the server's word
    overload: bool = False
    answered: bool = False  # the server is there and took the key


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int | None = Field(default=None, ge=0)


class _Body(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _Server:
    """One endpoint during a run. `schemas` turns false when it does not take response_format;
    `reached` turns true with its first response, `answered` and `schema_answered` when it has
    completed a request (with one).

    Each request in flight has a client with one connection, the last used first: httpx's own pool
    looks at all connections for every request, which at 200 costs more than the request.
    """

    def __init__(self, endpoint: Endpoint, options: AskOptions) -> None:
        self.endpoint = endpoint
        self.slot = Slot(options.concurrency)
        self.schemas = options.structured == "auto"
        self.reached = False
        self.answered = False
        self.schema_answered = False
        self.key = endpoint.key()
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        # Made once: reading the certificates takes longer than many a request.
        self._tls = httpx.create_ssl_context() if endpoint.url.startswith("https") else False
        # The whole answer is timed by the caller, not its single reads.
        self._timeout = httpx.Timeout(None, connect=min(30.0, options.timeout))
        self._clients: list[httpx.AsyncClient] = []
        self._idle: list[httpx.AsyncClient] = []

    async def post(self, url: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        client = self._idle.pop() if self._idle else self._connect()
        try:
            return await client.post(url, content=content, headers=headers)
        finally:
            self._idle.append(client)

    def _connect(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(verify=self._tls, limits=_ONE, timeout=self._timeout)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    def body(self, prompt: Prompt, options: AskOptions, schema: bool) -> dict[str, Any]:
        messages = [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": prompt.user},
        ]
        body = {"model": self.endpoint.model, "messages": messages} | options.sampling()
        if prompt.schema is not None and schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": prompt.schema.name,
                    "strict": True,
                    "schema": prompt.schema.schema,
                },
            }
        return body


class Llm:
    """All endpoints of a run, under one set of limits. An async context manager."""

    def __init__(self, endpoints: list[Endpoint], options: AskOptions) -> None:
        self.options = options
        self._servers = [_Server(endpoint, options) for endpoint in endpoints]
        self._slots = Slots([server.slot for server in self._servers], options.concurrency)
        rpm, tpm = options.requests_per_minute, options.tokens_per_minute
        self._requests = RateLimit(rpm) if rpm else None
        self._tokens = RateLimit(tpm) if tpm else None
        self._stopped: Exception | None = None
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
            self._slots.fail_waiting(error)

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
                await self._sleep(backoff(tries, self.options.backoff, self.options.most_backoff))

    @staticmethod
    def _learn(server: _Server, prompt: Prompt, with_schema: bool) -> None:
        """An answer without the schema that was refused before, or one with it."""
        server.answered = True
        server.schema_answered |= with_schema
        if prompt.schema is not None and not with_schema and server.schemas:
            server.schemas = False
            log.warning(
                "endpoint takes no response_format: its answers are parsed strictly instead",
                extra={"endpoint": server.endpoint.url},
            )

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the run."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._stopped is None and (left := end - loop.time()) > 0:
            await asyncio.sleep(min(left, 0.25))

    async def _try(
        self, server: _Server, prompt: Prompt, key: str, schema: bool
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
            reason = f"{type(error).__name__}: {self._redact(server, str(error))}"
            never = isinstance(error, httpx.ConnectError) and not server.reached
            return Failure("fatal" if never else "again", reason)
        server.reached = True
        outcome = self._read(server, response)
        if isinstance(outcome, Completion):
            self._charge(outcome, estimate)
        return outcome

    def _charge(self, answer: Completion, estimate: float) -> None:
        if self._tokens is None or answer.prompt_tokens is None or answer.completion_tokens is None:
            return
        self._tokens.correct(answer.prompt_tokens + answer.completion_tokens - estimate)

    def _read(self, server: _Server, response: httpx.Response) -> Completion | Failure:
        status = response.status_code
        if status == 200:
            return _completion(server, response.content)
        reason = self._redact(server, f"HTTP {status}: {_error_text(response)}")
        if status in FATAL or (status in FATAL_AT_FIRST and not server.answered):
            return Failure("fatal", reason, answered=True)
        if status == 429 and any(code in response.text for code in QUOTA_CODES):
            return Failure("fatal", reason, answered=True)
        if 300 <= status < 400:
            return Failure(
                "fatal", f"{reason} (redirects are not followed: give the final address)"
            )
        if status in AGAIN or status >= 500:
            wait = retry_after(response.headers.get("retry-after"))
            return Failure("again", reason, wait, overload=status in (429, 503), answered=True)
        return Failure("refused", reason, answered=True)

    def _redact(self, server: _Server, text: str) -> str:
        """Error texts of servers may repeat the key."""
        return text.replace(server.key, "***") if server.key else text

    def _account(self, server: _Server, outcome: Completion | Failure, sent: float) -> None:
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
        if outcome.wait is not None:
            if outcome.wait > self.options.give_up_after:
                self.stop(_down(server, f"it asks to wait {outcome.wait:.0f} s"))
            server.slot.pause(now + outcome.wait)
        silent = now - self._last_success
        if self._failures >= FAILURES_IN_A_ROW and silent >= self.options.give_up_after:
            what = f"{self._failures} failures in a row over {silent:.0f} s, the last one: "
            self.stop(_down(server, what + outcome.reason))

    def _diagnosis(self, server: _Server, failure: Failure) -> EndpointError:
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


def _down(server: _Server, why: str) -> StoppedError:
    return StoppedError(
        f"{server.endpoint.url} is down or overloaded ({why}). What was done is kept; run the "
        "command again to resume"
    )


def _completion(server: _Server, content: bytes) -> Completion | Failure:
    try:
        body = _Body.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        return Failure("again", f"malformed answer ({where or 'body'}: {problem['msg']})")
    usage = body.usage or _Usage()
    choice = body.choices[0]
    return Completion(
        text=choice.message.content or "",
        model=server.endpoint.model,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _error_text(response: httpx.Response) -> str:
    """The server's own words, shortened to one line."""
    try:
        error = json.loads(response.content)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200]
