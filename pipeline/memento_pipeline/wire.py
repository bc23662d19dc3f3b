"""What is sent to an endpoint, and what its response means. Decides nothing about when.

malformed body, 408, 409, 425, 429, 5xx                       again
401, 402, exhausted quota, redirect; 403, 404 before any      fatal
success
other 4xx                                                     refused
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

import httpx
from pydantic import BaseModel, Field, ValidationError

from memento_pipeline.endpoints import AskOptions, Endpoint
from memento_pipeline.limits import Slot, retry_after

FATAL = {401, 402}
FATAL_AT_FIRST = {403, 404}  # later they may be about one request (moderation)
AGAIN = {408, 409, 425, 429}
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


class Server:
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

    def read(self, response: httpx.Response) -> Completion | Failure:
        """The answer in a response, or what its failure means."""
        status = response.status_code
        if status == 200:
            return _completion(self.endpoint.model, response.content)
        reason = self.redact(f"HTTP {status}: {_error_text(response)}")
        if status in FATAL or (status in FATAL_AT_FIRST and not self.answered):
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

    def redact(self, text: str) -> str:
        """Error texts of servers may repeat the key."""
        return text.replace(self.key, "***") if self.key else text


def _completion(model: str, content: bytes) -> Completion | Failure:
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
        model=model,
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
