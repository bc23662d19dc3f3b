"""The command line options of the stages, defined once, and how they become `RunOptions`.

An option that is not given is None here: its default is that of the options record, or, when a
folder is resumed, what the folder was started with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from typer import Option

from memento_pipeline.assemble import AssembleOptions
from memento_pipeline.endpoints import AskOptions, Endpoint
from memento_pipeline.export import ExportOptions
from memento_pipeline.options import RULES, RunOptions, Shard
from memento_pipeline.read import ReadOptions
from memento_pipeline.score import ScoreOptions
from memento_pipeline.segment import SegmentOptions
from memento_pipeline.summarize import SummarizeOptions
from memento_sgl.errors import ConfigError

OUT = "Where and whether"
MODEL = "Model"
LIMITS = "Limits and cost"
SCORING = "Scoring"
CUTTING = "Cutting"
MEMENTOS = "Mementos"
READING = "Reading"
FILES = "Output files"

Inputs = Annotated[
    list[Path] | None,
    typer.Argument(help="JSONL or Parquet files, or folders of them.", show_default=False),
]
Out = Annotated[Path, Option("--out", "-o", help="Work and output folder.", rich_help_panel=OUT)]


Limit = Annotated[int | None, Option("--limit", help="Only the first N rows.", rich_help_panel=OUT)]
ShardOf = Annotated[
    str | None,
    Option("--shard", help="Part i/n of the input, for several machines.", rich_help_panel=OUT),
]
Tokenizer = Annotated[
    str | None,
    Option("--tokenizer", help="tokenizer.json or its folder, for sizes.", rich_help_panel=OUT),
]
OpenTraces = Annotated[
    int | None,
    Option("--open-traces", help="Traces worked on at the same time.", rich_help_panel=OUT),
]

Column = Annotated[
    list[str] | None,
    Option("--column", help="ROLE=NAME, for example id=key.", rich_help_panel=READING),
]
LeastTrace = Annotated[
    int | None,
    Option("--min-trace-tokens", help="Of a thought [default: 200].", rich_help_panel=READING),
]
MostTrace = Annotated[
    int | None,
    Option("--max-trace-tokens", help="Of a thought [default: none].", rich_help_panel=READING),
]
DropCjk = Annotated[
    bool | None,
    Option("--drop-cjk/--keep-cjk", help="Thoughts with CJK characters.", rich_help_panel=READING),
]
KeepBlocks = Annotated[
    bool | None,
    Option(
        "--keep-blocks/--cut-again",
        help="Of rows that have blocks; only their mementos are made anew.",
        rich_help_panel=READING,
    ),
]
RequireClosed = Annotated[
    bool | None,
    Option(
        "--require-closed/--allow-open",
        help="Leave out thoughts that never reach </think>.",
        rich_help_panel=READING,
    ),
]

MaxRow = Annotated[
    int | None,
    Option("--max-row-tokens", help="Of a response [default: none].", rich_help_panel=FILES),
]
TooLong = Annotated[
    str | None,
    Option("--too-long", help="drop, or cut after a whole block.", rich_help_panel=FILES),
]
ChatTemplateName = Annotated[
    str | None,
    Option("--chat-template", help="memento_nosys, memento or a file.", rich_help_panel=FILES),
]
TrainTokenizer = Annotated[
    Path | None,
    Option(
        "--train-tokenizer",
        help="tokenizer.json with the markers, for the tokenized dataset.",
        rich_help_panel=FILES,
    ),
]
MaskDelimiters = Annotated[
    bool | None,
    Option(
        "--mask-delimiters/--keep-delimiters",
        help="Whether evicted spans cover the block markers.",
        rich_help_panel=FILES,
    ),
]
DatasetName = Annotated[
    str | None, Option("--name", help="Of the dataset, in its card.", rich_help_panel=FILES)
]

Model = Annotated[
    str | None,
    Option("--model", help=f"Model name, or '{RULES}': no LLM, a baseline.", rich_help_panel=MODEL),
]
BaseUrl = Annotated[
    str | None, Option("--base-url", help="Address of the endpoint, .../v1.", rich_help_panel=MODEL)
]
KeyEnv = Annotated[
    str | None,
    Option("--api-key-env", help="NAME of the variable that holds the key.", rich_help_panel=MODEL),
]
Endpoints = Annotated[
    list[str] | None,
    Option("--endpoint", help="url,key-env,model; may be repeated.", rich_help_panel=MODEL),
]
Temperature = Annotated[
    float | None, Option("--temperature", help="Default: the server's.", rich_help_panel=MODEL)
]
MaxTokens = Annotated[
    int | None,
    Option("--max-tokens", help="Of one answer, reasoning included.", rich_help_panel=MODEL),
]
ExtraBody = Annotated[
    str | None,
    Option("--extra-body", help="JSON object to add to each request.", rich_help_panel=MODEL),
]
Structured = Annotated[
    str | None,
    Option("--structured", help="auto: JSON schema where taken; or off.", rich_help_panel=MODEL),
]

Concurrency = Annotated[
    int | None,
    Option("--concurrency", help="Requests at once [default: 64].", rich_help_panel=LIMITS),
]
Rpm = Annotated[
    float | None,
    Option("--requests-per-minute", help="Over all endpoints.", rich_help_panel=LIMITS),
]
Tpm = Annotated[
    float | None,
    Option("--tokens-per-minute", help="Prompt and answer, all endpoints.", rich_help_panel=LIMITS),
]
Timeout = Annotated[
    float | None,
    Option("--timeout", help="Seconds for one answer [default: 600].", rich_help_panel=LIMITS),
]
Retries = Annotated[
    int | None, Option("--retries", help="Of one request [default: 8].", rich_help_panel=LIMITS)
]
GiveUpAfter = Annotated[
    float | None,
    Option(
        "--give-up-after",
        help="Seconds without any answer until the run stops.",
        rich_help_panel=LIMITS,
    ),
]
PriceIn = Annotated[
    float | None,
    Option("--price-in", help="Dollars per million prompt tokens.", rich_help_panel=LIMITS),
]
PriceOut = Annotated[
    float | None,
    Option("--price-out", help="Dollars per million answer tokens.", rich_help_panel=LIMITS),
]
Budget = Annotated[
    float | None,
    Option("--budget", help="Dollars, all runs on the folder together.", rich_help_panel=LIMITS),
]
Tries = Annotated[
    int | None,
    Option(
        "--tries", help="Unusable answers in a row until a trace fails.", rich_help_panel=LIMITS
    ),
]

Window = Annotated[
    int | None,
    Option("--window", help="Boundaries in a window [default: 16].", rich_help_panel=SCORING),
]
PerCall = Annotated[
    int | None,
    Option("--windows-per-call", help="Windows in a call [default: 4].", rich_help_panel=SCORING),
]
SecondWindow = Annotated[
    int | None,
    Option("--second-window", help="Second pass, averaged (11).", rich_help_panel=SCORING),
]

Penalty = Annotated[
    float | None,
    Option("--penalty", help="Weight of uneven sizes [default: 0.5].", rich_help_panel=CUTTING),
]
MinTokens = Annotated[
    int | None, Option("--min-block-tokens", help="[default: 200]", rich_help_panel=CUTTING)
]
MaxBlock = Annotated[
    int | None, Option("--max-block-tokens", help="[default: none]", rich_help_panel=CUTTING)
]

Rounds = Annotated[
    int | None,
    Option("--rounds", help="Judge rounds at most [default: 2].", rich_help_panel=MEMENTOS),
]
Threshold = Annotated[
    float | None,
    Option("--threshold", help="Below it a memento is refined [8].", rich_help_panel=MEMENTOS),
]
LeastRatio = Annotated[
    float | None,
    Option("--least-ratio", help="Memento per block tokens [0.15].", rich_help_panel=MEMENTOS),
]
MostRatio = Annotated[
    float | None,
    Option("--most-ratio", help="The same, upper end [0.25].", rich_help_panel=MEMENTOS),
]
CallTokens = Annotated[
    int | None,
    Option("--call-tokens", help="Block tokens in a call [60000].", rich_help_panel=MEMENTOS),
]
GateMean = Annotated[
    float | None,
    Option("--gate-mean", help="Least mean judge score of a trace [8].", rich_help_panel=MEMENTOS),
]
GateLeast = Annotated[
    float | None,
    Option("--gate-least", help="Least score of any memento [6].", rich_help_panel=MEMENTOS),
]
GateRatio = Annotated[
    float | None,
    Option("--gate-ratio", help="Most memento per block tokens [0.5].", rich_help_panel=MEMENTOS),
]
GateProblems = Annotated[
    bool | None,
    Option(
        "--gate-problems/--no-gate-problems",
        help="Leave out traces whose mementos fail the mechanical checks.",
        rich_help_panel=MEMENTOS,
    ),
]

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
    if not texts:
        if model:
            raise ConfigError(
                f"--model {model} needs an endpoint: give --base-url, for example "
                "http://127.0.0.1:30000/v1 for `memento serve`"
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
