"""`memento convert` and the stages as commands of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from memento_pipeline.cli import declarations as o

CONVERT_HELP = """Turn raw chain-of-thought traces into training data with blocks and mementos.

Reads JSON, JSONL, Parquet or dataset folders; docs/pipeline-formats.md lists the forms and columns.
Keeps everything it does in one SQLite file in --out, so a run that ended (kill -9, Ctrl-C, full
disk, budget) goes on where it was when the same command is given again. API keys are read from
environment variables only.

Offline, no model, a baseline for trying things out:

    memento convert traces.jsonl --out work

With a local server (for example `memento serve`):

    memento convert traces.jsonl --out work --model Qwen/Qwen3-8B --base-url http://127.0.0.1:30000/v1

What will it cost? Then look at three rows, then all, with a ceiling:

    memento convert ... --price-in 0.2 --price-out 0.8 --dry-run
    memento convert ... --preview 3
    memento convert ... --budget 25 --concurrency 200

Go on with the options the folder was started with; try the failed ones again:

    memento convert --out work --resume --retry-failed

Several machines: --shard 1/4 ... --shard 4/4 into four folders, then `memento merge`.

Exit code: 0 all ok, 2 usage, 3 some traces failed, 4 some left out, 5 stopped early, 6 the folder
is locked, damaged or made with other settings, 130 interrupted.
"""

Preview = Annotated[
    int | None, Option("--preview", help="Do N rows and print them.", rich_help_panel=o.OUT)
]
DryRun = Annotated[
    bool,
    Option("--dry-run", help="Count calls, tokens and cost; ask nobody.", rich_help_panel=o.OUT),
]
Resume = Annotated[
    bool,
    Option("--resume", help="Go on, with the folder's recorded options.", rich_help_panel=o.OUT),
]
RetryFailed = Annotated[
    bool, Option("--retry-failed", help="Try failed traces again.", rich_help_panel=o.OUT)
]
Redo = Annotated[
    list[str] | None,
    Option("--redo", help="Drop a stage and those after it first.", rich_help_panel=o.OUT),
]
RedoThis = Annotated[bool, Option("--redo", help="Drop this stage and those after it first.")]
Ray = Annotated[
    int | None, Option("--ray", help="N shards on a Ray cluster.", rich_help_panel=o.OUT)
]
Quiet = Annotated[
    bool, Option("--quiet", "-q", help="No progress, no summary.", rich_help_panel=o.OUT)
]


def convert(
    out: o.Out,
    inputs: o.Inputs = None,
    model: o.Model = None,
    base_url: o.BaseUrl = None,
    api_key_env: o.KeyEnv = None,
    endpoint: o.Endpoints = None,
    temperature: o.Temperature = None,
    max_tokens: o.MaxTokens = None,
    extra_body: o.ExtraBody = None,
    structured: o.Structured = None,
    concurrency: o.Concurrency = None,
    requests_per_minute: o.Rpm = None,
    tokens_per_minute: o.Tpm = None,
    timeout: o.Timeout = None,
    first_timeout: o.FirstTimeout = None,
    retries: o.Retries = None,
    give_up_after: o.GiveUpAfter = None,
    price_in: o.PriceIn = None,
    price_out: o.PriceOut = None,
    price_cached: o.PriceCached = None,
    budget: o.Budget = None,
    tries: o.Tries = None,
    window: o.Window = None,
    windows_per_call: o.PerCall = None,
    second_window: o.SecondWindow = None,
    penalty: o.Penalty = None,
    min_block_tokens: o.MinTokens = None,
    max_block_tokens: o.MaxBlock = None,
    rounds: o.Rounds = None,
    threshold: o.Threshold = None,
    least_ratio: o.LeastRatio = None,
    most_ratio: o.MostRatio = None,
    call_tokens: o.CallTokens = None,
    gate_mean: o.GateMean = None,
    gate_least: o.GateLeast = None,
    gate_ratio: o.GateRatio = None,
    gate_problems: o.GateProblems = None,
    column: o.Column = None,
    min_trace_tokens: o.LeastTrace = None,
    max_trace_tokens: o.MostTrace = None,
    drop_cjk: o.DropCjk = None,
    require_closed: o.RequireClosed = None,
    require_answer: o.RequireAnswer = None,
    keep_blocks: o.KeepBlocks = None,
    split: o.Split = None,
    generations: o.Generations = None,
    tokenizer: o.Tokenizer = None,
    limit: o.Limit = None,
    shard: o.ShardOf = None,
    max_row_tokens: o.MaxRow = None,
    too_long: o.TooLong = None,
    chat_template: o.ChatTemplateName = None,
    train_tokenizer: o.TrainTokenizer = None,
    mask_delimiters: o.MaskDelimiters = None,
    name: o.DatasetName = None,
    open_traces: o.OpenTraces = None,
    preview: Preview = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    redo: Redo = None,
    ray: Ray = None,
    quiet: Quiet = False,
) -> None:
    values = dict(locals())
    from memento_pipeline.cli import execute

    execute.convert(values)


def split(
    out: o.Out,
    inputs: o.Inputs = None,
    column: o.Column = None,
    min_trace_tokens: o.LeastTrace = None,
    max_trace_tokens: o.MostTrace = None,
    drop_cjk: o.DropCjk = None,
    require_closed: o.RequireClosed = None,
    require_answer: o.RequireAnswer = None,
    keep_blocks: o.KeepBlocks = None,
    split: o.Split = None,
    generations: o.Generations = None,
    tokenizer: o.Tokenizer = None,
    limit: o.Limit = None,
    shard: o.ShardOf = None,
    redo: RedoThis = False,
    quiet: Quiet = False,
) -> None:
    """Read traces into the folder and cut them into sentences.

    memento split traces.jsonl --out work
    """
    _stage("split", dict(locals()))


def score(
    out: o.Out,
    model: o.Model = None,
    base_url: o.BaseUrl = None,
    api_key_env: o.KeyEnv = None,
    endpoint: o.Endpoints = None,
    temperature: o.Temperature = None,
    max_tokens: o.MaxTokens = None,
    extra_body: o.ExtraBody = None,
    structured: o.Structured = None,
    concurrency: o.Concurrency = None,
    requests_per_minute: o.Rpm = None,
    tokens_per_minute: o.Tpm = None,
    timeout: o.Timeout = None,
    first_timeout: o.FirstTimeout = None,
    retries: o.Retries = None,
    price_in: o.PriceIn = None,
    price_out: o.PriceOut = None,
    price_cached: o.PriceCached = None,
    budget: o.Budget = None,
    tries: o.Tries = None,
    window: o.Window = None,
    windows_per_call: o.PerCall = None,
    second_window: o.SecondWindow = None,
    limit: o.Limit = None,
    redo: RedoThis = False,
    quiet: Quiet = False,
) -> None:
    """Grade the boundaries of split traces.

    memento score --out work --model M --base-url http://127.0.0.1:30000/v1
    """
    _stage("score", dict(locals()))


def segment(
    out: o.Out,
    penalty: o.Penalty = None,
    min_block_tokens: o.MinTokens = None,
    max_block_tokens: o.MaxBlock = None,
    limit: o.Limit = None,
    redo: RedoThis = False,
    quiet: Quiet = False,
) -> None:
    """Cut graded traces into blocks.

    memento segment --out work --penalty 0.8 --redo
    """
    _stage("segment", dict(locals()))


def summarize(
    out: o.Out,
    model: o.Model = None,
    base_url: o.BaseUrl = None,
    api_key_env: o.KeyEnv = None,
    endpoint: o.Endpoints = None,
    temperature: o.Temperature = None,
    max_tokens: o.MaxTokens = None,
    extra_body: o.ExtraBody = None,
    structured: o.Structured = None,
    concurrency: o.Concurrency = None,
    requests_per_minute: o.Rpm = None,
    tokens_per_minute: o.Tpm = None,
    timeout: o.Timeout = None,
    first_timeout: o.FirstTimeout = None,
    retries: o.Retries = None,
    price_in: o.PriceIn = None,
    price_out: o.PriceOut = None,
    price_cached: o.PriceCached = None,
    budget: o.Budget = None,
    tries: o.Tries = None,
    rounds: o.Rounds = None,
    threshold: o.Threshold = None,
    least_ratio: o.LeastRatio = None,
    most_ratio: o.MostRatio = None,
    call_tokens: o.CallTokens = None,
    gate_mean: o.GateMean = None,
    gate_least: o.GateLeast = None,
    gate_ratio: o.GateRatio = None,
    gate_problems: o.GateProblems = None,
    limit: o.Limit = None,
    redo: RedoThis = False,
    quiet: Quiet = False,
) -> None:
    """Write, judge and refine a memento for every block.

    memento summarize --out work --model M --base-url http://127.0.0.1:30000/v1
    """
    _stage("summarize", dict(locals()))


def assemble(
    out: o.Out,
    max_row_tokens: o.MaxRow = None,
    too_long: o.TooLong = None,
    chat_template: o.ChatTemplateName = None,
    train_tokenizer: o.TrainTokenizer = None,
    mask_delimiters: o.MaskDelimiters = None,
    name: o.DatasetName = None,
    quiet: Quiet = False,
) -> None:
    """Write the output files from what the folder holds; asks nobody, changes nothing else.

    memento assemble --out work --train-tokenizer Qwen3-8B-Memento --max-row-tokens 32768
    """
    values = dict(locals())
    from memento_pipeline.cli import execute

    execute.assemble(values)


def merge(
    folders: Annotated[list[Path], typer.Argument(help="The folders of all shards.")],
    out: o.Out,
    quiet: Quiet = False,
) -> None:
    """Bring the folders of several machines together and write the output files.

    memento merge work-1 work-2 work-3 work-4 --out work
    """
    from memento_pipeline.cli import execute

    execute.merge(out, folders, quiet)


def _stage(stage: str, values: dict[str, Any]) -> None:
    from memento_pipeline.cli import execute

    execute.stage(stage, values)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    panel = "Data pipeline"
    app.command(help=CONVERT_HELP, rich_help_panel=panel)(convert)
    for command in (split, score, segment, summarize, assemble, merge):
        app.command(rich_help_panel="Data pipeline, stage by stage")(command)
