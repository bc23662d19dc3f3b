"""Which endpoints to ask, with which key, model and options."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from memento_sgl.address import api_root
from memento_sgl.environment import secret
from memento_sgl.errors import ConfigError

DEFAULT_KEY_ENV = "MEMENTO_API_KEY"


class Endpoint(BaseModel):
    """An OpenAI-compatible server. The key itself is looked up when it is needed and not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str  # where /chat/completions stands, see `api_root`
    key_env: str | None = None  # None: DEFAULT_KEY_ENV if it is set, else no key
    model: str

    @classmethod
    def parse(cls, text: str, model: str | None) -> Endpoint:
        """Read `url[,key-env[,model]]`.

        Raises:
            ConfigError: malformed, with a secret in it, or without a model.
        """
        url, key_env, own_model, *rest = [part.strip() for part in [*text.split(","), "", ""]]
        if any(rest):
            raise ConfigError(
                "--endpoint expects url,key-env,model, for example "
                "http://127.0.0.1:30000,,Qwen/Qwen3-8B"
            )
        url = api_root(url)
        if key_env and not key_env.isidentifier():
            raise ConfigError(
                "the second part of --endpoint is the NAME of an environment variable that holds "
                "the key, not the key itself"
            )
        if not (own_model or model):
            raise ConfigError(f"endpoint {url} has no model: give --model NAME")
        return cls(url=url, key_env=key_env or None, model=own_model or str(model))

    @property
    def variable(self) -> str:
        """The environment variable that holds the key."""
        return self.key_env or DEFAULT_KEY_ENV

    def key(self) -> str | None:
        """The API key.

        Raises:
            ConfigError: a variable was named but is not set.
        """
        value = secret(self.variable)
        if value is None and self.key_env:
            raise ConfigError(
                f"endpoint {self.url} needs its key in the environment variable {self.key_env}, "
                "which is not set"
            )
        return value


class AskOptions(BaseModel):
    """How endpoints are asked. The first group decides what they answer (and is fingerprinted);
    the second only when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = None  # None: the server's default
    max_tokens: int | None = Field(default=None, ge=1)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    structured: Literal["auto", "off"] = "auto"

    concurrency: int = Field(default=64, ge=1)
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    timeout: float = Field(default=600.0, gt=0)  # seconds for one whole answer
    first_timeout: float = Field(default=300.0, gt=0)  # seconds until the very first response
    retries: int = Field(default=8, ge=0)
    backoff: float = Field(default=0.5, ge=0)  # seconds before the first retry
    most_backoff: float = Field(default=30.0, ge=0)
    give_up_after: float = Field(default=120.0, gt=0)  # seconds without any success
    price_in: float | None = Field(default=None, ge=0)  # dollars per million tokens
    price_out: float | None = Field(default=None, ge=0)
    price_cached: float | None = Field(default=None, ge=0)  # prompt tokens from a cache; None: in
    budget: float | None = Field(default=None, gt=0)  # dollars, all runs on a folder together

    def sampling(self) -> dict[str, Any]:
        """What goes into the request body besides messages and model."""
        named = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in named.items() if value is not None} | self.extra_body

    def dollars(
        self, prompt_tokens: int | None, completion_tokens: int | None, cached: int | None = None
    ) -> float | None:
        """The price of an answer; None when a price or a count is unknown. `cached` of the prompt
        tokens came from the provider's cache."""
        if self.price_in is None or self.price_out is None:
            return None
        if prompt_tokens is None or completion_tokens is None:
            return None
        known = min(cached or 0, prompt_tokens)
        rate = self.price_in if self.price_cached is None else self.price_cached
        paid = (prompt_tokens - known) * self.price_in + known * rate
        return (paid + completion_tokens * self.price_out) / 1e6
