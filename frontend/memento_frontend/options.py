"""How a question is to be asked: budgets, sampling per part, the shape of the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import RequestOptions


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one part; None: what `run()` was given, else SGLang's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `reason`, `vote`, `reason_in_one_call` and `run_batch`.

    Attributes:
        max_tokens: of thought and answer together; at most what the context leaves.
        max_blocks: then the thought is closed; None: the model decides.
        max_block_tokens, max_summary_tokens: the server closes a block or memento at this length.
        max_answer_tokens: of the answer; None: what is left of `max_tokens`.
        block: sampling of blocks and of what stands between them.
        memento: sampling of mementos.
        answer: sampling of the answer.
        json_schema, regex: what the answer, all that follows `</think>`, must match; a schema is
            a JSON object or its text.
        constrain: "off", "caps" or "strict": what may be sampled (docs/semantics.md).
        server: other options of the request (docs/semantics.md), by their names there.

    Raises:
        ConfigError: a value or combination that cannot work.
        RequestError: a server option that does not exist.
    """

    max_tokens: int = 32768
    max_blocks: int | None = None
    max_block_tokens: int | None = None
    max_summary_tokens: int | None = None
    max_answer_tokens: int | None = None
    block: Sampling = field(default_factory=Sampling)
    memento: Sampling = field(default_factory=Sampling)
    answer: Sampling = field(default_factory=Sampling)
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    constrain: str | None = None
    server: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (part.name for part in fields(self) if part.name.startswith("max_")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number above 0, not {value!r}")
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError("json_schema and regex exclude each other: give one of them")
        if isinstance(self.json_schema, str):
            try:
                json.loads(self.json_schema)
            except ValueError as error:
                raise ConfigError(f"json_schema is not valid JSON: {error}") from None
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ConfigError(f"regex is not valid: {error}") from None
        twice = self.server.keys() & self._named().keys()
        if twice:
            raise ConfigError(f"{', '.join(sorted(twice))} in `server` has an option of its own")
        RequestOptions.parse(self.request())

    @classmethod
    def greedy(cls, **values: Any) -> Options:
        """Options with temperature 0 everywhere."""
        return cls(block=GREEDY, memento=GREEDY, answer=GREEDY, **values)

    @property
    def strict(self) -> bool:
        """Whether the server keeps to the form, `max_blocks` included."""
        return self.constrain == "strict"

    def request(self) -> dict[str, Any]:
        """The overrides that go along as `custom_params["memento"]`."""
        named = {name: value for name, value in self._named().items() if value is not None}
        return {**self.server, **named}

    def answer_shape(self) -> dict[str, str]:
        """Sampling parameters that constrain the answer."""
        if self.regex is not None:
            return {"regex": self.regex}
        if self.json_schema is None:
            return {}
        schema = self.json_schema
        return {"json_schema": schema if isinstance(schema, str) else json.dumps(schema)}

    def _named(self) -> dict[str, Any]:
        return {
            "max_block_tokens": self.max_block_tokens,
            "max_summary_tokens": self.max_summary_tokens,
            "constrain": self.constrain,
            "max_blocks": self.max_blocks if self.strict else None,
        }
