"""From the options of the command line (see `options`) to `RunOptions`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from memento_pipeline import RULES
from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.output.assemble import AssembleOptions
from memento_pipeline.output.export import ExportOptions
from memento_pipeline.read.rows import ReadOptions
from memento_pipeline.run.run_options import RunOptions, Shard
from memento_pipeline.stages.score import ScoreOptions
from memento_pipeline.stages.segment import SegmentOptions
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_sgl.cli.user_config import default_base_url
from memento_sgl.errors import ConfigError

PARTS: dict[str, tuple[type[Any], dict[str, str]]] = {
    "read": (
        ReadOptions,
        {"min_tokens": "min_trace_tokens", "max_tokens": "max_trace_tokens"},
    ),
    "score": (ScoreOptions, {}),
    "segment": (
        SegmentOptions,
        {"min_tokens": "min_block_tokens", "max_tokens": "max_block_tokens"},
    ),
    "summarize": (SummarizeOptions, {}),
    "ask": (AskOptions, {}),
    "rows": (AssembleOptions, {"max_tokens": "max_row_tokens"}),
    "export": (ExportOptions, {"tokenizer": "train_tokenizer"}),
}
"""Part of `RunOptions` to its type and to the options that have another name than the field."""


def build(values: Mapping[str, Any], recorded: str | None = None) -> RunOptions:
    """Options of a run from those of the command line (None: not given).

    Args:
        recorded: JSON of the options that the folder was started with; the base where an option is
            not given.

    Raises:
        ConfigError: an option that cannot work, named.
    """
    given = {name: value for name, value in values.items() if value not in (None, [])}
    if "extra_body" in given:
        given["extra_body"] = _json_object(given["extra_body"])
    if "column" in given:
        given["columns"] = _pairs(given["column"])
    options: dict[str, Any] = json.loads(recorded) if recorded else {}
    for part, (kind, renamed) in PARTS.items():
        named = {name: renamed.get(name, name) for name in _names(kind)}
        own = {name: given[option] for name, option in named.items() if option in given}
        options[part] = options.get(part, {}) | own
    options |= {
        name: given[name] for name in ("out", "limit", "open_traces", "tokenizer") if name in given
    }
    if "inputs" in given:
        options["inputs"] = given["inputs"]
    if "shard" in given:
        options["shard"] = Shard.parse(given["shard"])
    endpoints = endpoints_of(given)
    if endpoints is not None:
        options["endpoints"] = endpoints
    try:
        return RunOptions.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        name = "--" + str(problem["loc"][-1] if problem["loc"] else "").replace("_", "-")
        raise ConfigError(f"{name}: {problem['msg']}") from None


def _names(kind: type[Any]) -> set[str]:
    if is_dataclass(kind):
        return {field.name for field in fields(kind)}
    assert issubclass(kind, BaseModel)
    return set(kind.model_fields)


def endpoints_of(given: Mapping[str, Any]) -> tuple[Endpoint, ...] | None:
    """The endpoints that --model, --base-url and --endpoint ask for; None when none is given.

    Raises:
        ConfigError: they contradict each other, or one is missing.
    """
    model, url = given.get("model"), given.get("base_url")
    texts = list(given.get("endpoint", ()))
    if url:
        texts.append(f"{url},{given.get('api_key_env', '')},{model or ''}")
    if model == RULES:
        if texts:
            raise ConfigError(f"--model {RULES} uses no endpoint: leave out --base-url, --endpoint")
        return ()
    if not texts and model and (meant := default_base_url()) is not None:
        texts.append(f"{meant},{given.get('api_key_env', '')},{model}")
    if not texts:
        if model:
            raise ConfigError(
                f"--model {model} needs an endpoint: give --base-url, for example "
                "http://127.0.0.1:30000 for `memento serve`"
            )
        return None
    return tuple(Endpoint.parse(text, model) for text in texts)


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if not all(text.partition("=")):
            raise ConfigError(f"--column expects ROLE=NAME, for example id=key, not {text!r}")
    return dict(text.split("=", 1) for text in texts)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("--extra-body must be a JSON object")
    return value
