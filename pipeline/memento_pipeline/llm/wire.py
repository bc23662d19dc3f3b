"""What is sent to an endpoint, and what it is known to take. Decides nothing about when."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import httpx

from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.llm.rate import Slot
from memento_pipeline.llm.responses import Completion, Failure, Response, read

__all__ = ["Completion", "Failure", "Prompt", "Schema", "Server"]

_ABOUT_SCHEMA = re.compile(r"response_format|json_schema|structured.output", re.I)
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=30)


class Schema(NamedTuple):
    """A JSON schema that the answer should follow, where the endpoint can enforce one."""

    name: str
    schema: dict[str, Any]


class Prompt(NamedTuple):
    """One question. `attempt` counts the askings of the same text: it makes their keys differ.
    `limit`: tokens that no sensible answer without reasoning exceeds."""

    trace_id: str
    stage: str
    system: str
    user: str
    schema: Schema | None = None
    attempt: int = 0
    limit: int | None = None


class Dialect:
    """What one endpoint takes, as found out from its refusals. Each change is made and told once.

    `schemas`: response_format. `limit_name`: newer models want `max_completion_tokens`.
    `temperature`: some take none. `limits`: whether a limit of ours may be sent, which would cut
    off a model that reasons.
    """

    def __init__(self, schemas: bool) -> None:
        self.schemas = schemas
        self.limit_name = "max_tokens"
        self.temperature = True
        self.limits = False  # until the first answer shows that the model does not reason

    def body(
        self, prompt: Prompt, model: str, options: AskOptions, *, schema: bool, limit: bool
    ) -> dict[str, Any]:
        """The request; `schema` and `limit` allow what the endpoint may not take."""
        sampling = options.sampling()
        if not self.temperature:
            sampling.pop("temperature", None)
        own = not {"max_tokens", "max_completion_tokens"} & set(sampling)
        if own and limit and self.limits and prompt.limit is not None:
            sampling["max_tokens"] = prompt.limit
        if self.limit_name != "max_tokens" and "max_tokens" in sampling:
            sampling[self.limit_name] = sampling.pop("max_tokens")
        messages = [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": prompt.user},
        ]
        body = {"model": model, "messages": messages} | sampling
        if prompt.schema is not None and schema and self.schemas:
            named = {"name": prompt.schema.name, "strict": True, "schema": prompt.schema.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body

    def adapt(self, sent: dict[str, Any], words: str) -> str | None:
        """Learn from a refusal. Returns what changed, in words; None when nothing did."""
        if "max_tokens" in sent and "max_completion_tokens" in words:
            self.limit_name = "max_completion_tokens"
            return "takes max_completion_tokens instead of max_tokens"
        if "temperature" in sent and "temperature" in words.lower():
            self.temperature = False
            return "takes no temperature: its answers are sampled as the server does by default"
        if "response_format" in sent and _ABOUT_SCHEMA.search(words):
            self.schemas = False
            return "takes no response_format: its answers are parsed strictly instead"
        return None


class Server:
    """One endpoint during a run.

    `reached` turns true with its first response, `answered` and `schema_answered` when it has
    completed a request (with a schema).

    Each request in flight has a client with one connection, the last used first: httpx's own pool
    looks at all connections for every request, which at 200 costs more than the request.
    """

    def __init__(self, endpoint: Endpoint, options: AskOptions) -> None:
        self.endpoint = endpoint
        self.slot = Slot(options.concurrency)
        self.dialect = Dialect(options.structured == "auto")
        self.reached = False
        self.answered = False
        self.schema_answered = False
        self.reasons = False  # the model was seen to reason
        self.first_sent: float | None = None
        self.unusable = 0  # responses in a row before the first success that no client could read
        self.slow = 0  # requests in a row that took too long although nothing else was in flight
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

    def read(self, response: httpx.Response) -> Completion | Failure:
        """The answer in a response, or what its failure means."""
        plain = Response(response.status_code, response.headers, response.content)
        outcome = read(plain, self.endpoint.model, before=self.answered)
        if isinstance(outcome, Failure):
            return outcome._replace(reason=self.redact(outcome.reason))
        return outcome

    def learn(self, answer: Completion, *, schema: bool) -> None:
        """A request was completed."""
        self.answered = True
        self.schema_answered |= schema
        self.unusable = self.slow = 0
        self.reasons |= answer.reasoned
        self.dialect.limits = not self.reasons

    def redact(self, text: str) -> str:
        """Error texts of servers may repeat the key."""
        return text.replace(self.key, "***") if self.key else text
