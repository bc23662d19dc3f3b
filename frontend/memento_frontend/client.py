"""One streamed question to any OpenAI-compatible server, with errors that say what to change."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import httpx
import openai

from memento_sgl.address import api_root, server_root
from memento_sgl.environment import secret
from memento_sgl.errors import ConfigError, ServerError
from memento_sgl.rule.config import MementoConfig

DEFAULT_KEY_ENV = "MEMENTO_API_KEY"
UNDERSTOOD = (400, 422)  # the server read the request and did not like it


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask and how. None leaves a choice to the server.

    Attributes:
        model: None: the only one that is served.
        key_env: variable that holds the API key; None: `MEMENTO_API_KEY` if it is set.
        memento: the request's own options (docs/semantics.md).
    """

    text: str
    base_url: str
    model: str | None = None
    key_env: str | None = None
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    memento: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]


class Client:
    """A connection to `question.base_url`.

    Raises:
        ConfigError: the named variable holds no key; `base_url` is no address; from `stream` also
            a model that is not served.
        ServerError: from every method: nobody answers, or a refusal, with the server's reason.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self._url = api_root(question.base_url)
        self._key = key_of(question.key_env) or "none"
        self._openai = openai.OpenAI(base_url=self._url, api_key=self._key)

    def connect(self) -> None:
        """Find out which model is asked, once for all questions."""
        with self._explained():
            _ = self._model

    def about(self, text: str) -> Self:
        """The same connection with another question."""
        other = copy(self)
        other.question = replace(self.question, text=text)
        return other

    def server_options(self) -> MementoConfig | None:
        """The options of a Memento server; None where the server tells none."""
        address = f"{server_root(self._url)}/server_info"
        headers = {"Authorization": f"Bearer {self._key}"}
        try:
            info = httpx.get(address, headers=headers, timeout=10).json()
        except (httpx.HTTPError, ValueError):
            return None  # not one of ours: then evictions are not known before the end
        return told_options(info)

    def stream(self) -> Generator[Any, None, None]:
        """The chunks of the answer, as soon as the server sends them."""
        with self._explained():
            body = self._body(self._model)
            while True:
                try:
                    stream = self._openai.chat.completions.create(**body)
                    break
                except openai.APIStatusError as error:
                    body = _without_extra(body, error, self.question.memento)
            with stream:
                yield from stream

    @cached_property
    def _model(self) -> str:
        wanted = self.question.model
        try:
            models = self._openai.with_options(max_retries=0).models.list()
            served = [model.id for model in models]
        except openai.NotFoundError:
            if wanted is None:
                raise ConfigError("the server does not list its models: give --model") from None
            return wanted
        if wanted is None:
            if len(served) != 1:
                raise ConfigError(f"give --model, one of: {', '.join(served)}")
            return served[0]
        if wanted not in served and wanted.partition(":")[0] not in served:  # NAME:ADAPTER
            raise ConfigError(f"--model {wanted!r} is not served there, but: {', '.join(served)}")
        return wanted

    def _body(self, model: str) -> dict[str, Any]:
        question = self.question
        options = {
            "temperature": question.temperature,
            "top_p": question.top_p,
            "max_tokens": question.max_tokens,
            "seed": question.seed,
        }
        extra: dict[str, Any] = {
            "custom_params": {"memento": question.memento | {"show_markers": True}}
        }
        if question.top_k is not None:
            extra["top_k"] = question.top_k
        return {
            "model": model,
            "messages": question.messages,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "extra_body": extra,
        } | {name: value for name, value in options.items() if value is not None}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the `openai` package in words for the user."""
        try:
            yield
        except openai.APIConnectionError as error:
            raise ServerError(
                f"no answer from {self._url} ({error.__cause__ or error}): start a server, for "
                "example `memento serve demo`, or name another with --base-url"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ServerError(
                f"{self._url} does not accept the API key ({_reason(error)}): give the variable "
                "that holds it with --api-key-env"
            ) from None
        except openai.APIStatusError as error:
            raise ServerError(
                f"{self._url} refused ({error.status_code}): {_reason(error)}"
            ) from None
        except (openai.APIError, httpx.HTTPError) as error:
            raise ServerError(f"{self._url} broke the answer off: {error}") from None


def key_of(variable: str | None) -> str | None:
    """The API key in the variable that the user named, or in `MEMENTO_API_KEY`.

    Raises:
        ConfigError: the named one holds none.
    """
    key = secret(variable or DEFAULT_KEY_ENV)
    if key is None and variable is not None:
        raise ConfigError(f"the environment variable {variable} holds no API key")
    return key


def told_options(server_info: Any) -> MementoConfig | None:
    """A Memento server's options in what `/server_info` answered; None: it is none."""
    try:
        told = server_info["internal_states"][0]["_memento"][0]
        known = {name: told[name] for name in MementoConfig.model_fields if name in told}
    except (KeyError, IndexError, TypeError):
        return None
    return MementoConfig.parse(known)


def _without_extra(
    body: dict[str, Any], error: openai.APIStatusError, asked: dict[str, Any]
) -> dict[str, Any]:
    """The request without what this server does not know and the user did not ask for.

    Raises:
        openai.APIStatusError: the refusal has another reason.
    """
    reason = _reason(error) if error.status_code in UNDERSTOOD else ""
    extra = body["extra_body"]
    custom = extra.get("custom_params", {}).get("memento", {})
    others = {name: value for name, value in extra.items() if name != "custom_params"}
    usage = body.get("stream_options", {})
    if "show_markers" in reason and "show_markers" in custom:
        wanted = {"custom_params": {"memento": asked}} if asked else {}
        return body | {"extra_body": wanted | others}
    if "custom_params" in reason and custom and not asked:
        return body | {"extra_body": others}
    if "continuous_usage_stats" in reason and len(usage) > 1:
        return body | {"stream_options": {"include_usage": True}}
    if "stream_options" in reason and usage:
        return {name: value for name, value in body.items() if name != "stream_options"}
    raise error


def _reason(error: openai.APIError) -> str:
    found = error.body.get("message") if isinstance(error.body, dict) else error.body
    return str(found or error.message)
