"""The command line options of the stages, defined once; `build_options` makes records of them.

An option that is not given is None: its default is that of the options record, or, when a folder is
resumed, what the folder was started with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from memento_pipeline import RULES
from memento_sgl.address import BASE_URL_ENV, BASE_URL_HELP

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
    typer.Argument(help="JSON, JSONL or Parquet files, or folders of them.", show_default=False),
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
RequireAnswer = Annotated[
    bool | None,
    Option(
        "--require-answer/--allow-no-answer",
        help="Leave out traces without an answer.",
        rich_help_panel=READING,
    ),
]
Split = Annotated[
    str | None,
    Option("--split", help="Of dataset folders, or all [default: train].", rich_help_panel=READING),
]
Generations = Annotated[
    str | None,
    Option(
        "--generations",
        help="Of several: first, all, or verified [default: verified where a column tells].",
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
    Option(
        "--chat-template", help="memento_nosys, memento, a file or a folder.", rich_help_panel=FILES
    ),
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
        "--mask-delimiters/--no-mask-delimiters",
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
    str | None,
    Option(
        "--base-url",
        help=f"{BASE_URL_HELP} With --model, {BASE_URL_ENV} if it is set.",
        rich_help_panel=MODEL,
    ),
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
FirstTimeout = Annotated[
    float | None,
    Option(
        "--first-timeout",
        help="Seconds until an endpoint's very first response [300].",
        rich_help_panel=LIMITS,
    ),
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
PriceCached = Annotated[
    float | None,
    Option(
        "--price-cached",
        help="The same, of prompt tokens read from a cache [default: --price-in].",
        rich_help_panel=LIMITS,
    ),
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
