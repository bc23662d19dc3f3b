"""`memento batch`: a file of questions through a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from memento_frontend import cli_options as o
from memento_sgl.address import DEFAULT_URL
from memento_sgl.errors import ConfigError
from memento_sgl.exit_codes import as_exit_code

HELP = """Answer a file of questions with a running server.

QUESTIONS is JSONL: objects with `question`, or `messages` of a chat, and an optional `id`. Results
are written as they come, one JSON line each: answer, blocks, mementos, accounting, or the reason
why it failed. Ended early (Ctrl-C, kill, server gone), the same command goes on.

    memento batch questions.jsonl --out answers.jsonl

    memento batch questions.jsonl --out answers.jsonl --attempts 8 --temperature 0.8

    memento batch questions.jsonl --out answers.jsonl --temperature 0 --json-schema schema.json

One engine call per step of a thought is the default (needs the extra `serve` on this side too).
--one-call asks for a thought and its answer at once: faster, the same tokens.

Exit code: 0 all answered, 1 the server cannot be used, 2 usage, 3 some questions failed, 5 stopped
early, 6 the output is in use, damaged or made with other settings, 130 interrupted.
"""
ANSWER = "Answer"


def batch(
    questions: Annotated[Path, Argument(metavar="QUESTIONS", help="JSONL.")],
    out: Annotated[Path, Option("--out", "-o", help="Results, JSONL.")],
    base_url: o.BaseUrl = DEFAULT_URL,
    api_key_env: o.KeyEnv = None,
    concurrency: Annotated[
        int, Option("--concurrency", help="Questions at once.", min=1, rich_help_panel=o.SERVER)
    ] = 16,
    one_call: Annotated[bool, Option("--one-call", help="One call per question.")] = False,
    attempts: Annotated[
        int, Option("--attempts", help="Per question; the majority counts.", min=1)
    ] = 1,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: Annotated[int | None, Option("--top-k", rich_help_panel=o.SAMPLING)] = None,
    min_p: Annotated[
        float | None, Option("--min-p", min=0.0, max=1.0, rich_help_panel=o.SAMPLING)
    ] = None,
    max_tokens: o.MaxTokens = None,
    max_blocks: o.MaxBlocks = None,
    max_block_tokens: o.MaxBlock = None,
    max_summary_tokens: o.MaxSummary = None,
    max_answer_tokens: Annotated[
        int | None, Option("--max-answer-tokens", rich_help_panel=ANSWER)
    ] = None,
    json_schema: Annotated[
        Path | None, Option("--json-schema", help="File: its shape.", rich_help_panel=ANSWER)
    ] = None,
    regex: Annotated[
        str | None, Option("--regex", help="What it must match.", rich_help_panel=ANSWER)
    ] = None,
    constrain: o.Constrain = None,
    keep_last_n_blocks: o.KeepLast = None,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Ask those again.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    values = dict(locals())
    raise typer.Exit(as_exit_code(lambda: _batch(values), "give the same command to go on"))


def _batch(values: dict[str, Any]) -> int:
    from rich.console import Console
    from rich.markup import escape

    from memento_frontend.batch import run_batch
    from memento_frontend.client import key_of
    from memento_frontend.native import NativeClient

    summary = run_batch(
        values["questions"],
        values["out"],
        NativeClient(values["base_url"], key_of(values["api_key_env"])),
        _options(values),
        progress=not values["quiet"],
        **{name: values[name] for name in ("attempts", "one_call", "concurrency")},
        retry_failed=values["retry_failed"],
    )
    if not values["quiet"]:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"{summary.answered:,} of {summary.total:,} answered, {summary.failed:,} failed, "
            f"{summary.earlier:,} from earlier: {escape(str(values['out']))}"
        )
    return 3 if summary.failed else 0


def _options(values: dict[str, Any]) -> Any:
    """Only what was given; the rest is the default of `Options`."""
    from memento_frontend.options import Options, Sampling

    names = (
        "max_tokens", "max_blocks", "max_block_tokens", "max_summary_tokens", "max_answer_tokens",
        "regex", "constrain",
    )  # fmt: skip
    given = {name: values[name] for name in names if values[name] is not None}
    if values["json_schema"] is not None:
        try:
            given["json_schema"] = values["json_schema"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{values['json_schema']} cannot be read: {error}") from None
    if values["keep_last_n_blocks"] is not None:
        given["server"] = {"keep_last_n_blocks": values["keep_last_n_blocks"]}
    sampling = Sampling(*(values[name] for name in ("temperature", "top_p", "top_k", "min_p")))
    return Options(block=sampling, memento=sampling, answer=sampling, **given)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(help=HELP, rich_help_panel="Ask")(batch)
