"""`memento think`."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from memento_frontend import cli_options as o
from memento_sgl.address import DEFAULT_URL

THINK_HELP = """Ask one question and watch the thought: blocks fold into mementos, KV goes down.

Needs a running server, by default the one of `memento serve MODEL` on this machine:

    memento serve demo --port 30000

    memento think "Digit sum mod 100? a372 b91 c55"

Any OpenAI-compatible server works; without mementos there is just less to see:

    memento think "Why is the sky blue?" --base-url https://HOST --model NAME --api-key-env KEY

The question may come from standard input; --json prints one object for scripts:

    memento think - --json --temperature 0 --max-tokens 4096 < question.txt

Keep the last two blocks; force well-formed blocks of at most 512 tokens:

    memento think "..." --keep-last-n-blocks 2 --constrain strict --max-block-tokens 512

Ctrl-C stops and keeps what was produced. Exit code: 0 answered, 1 the server did not answer,
refused or broke off, 2 usage, 130 interrupted.
"""

Asked = Annotated[str, typer.Argument(help="The question, or - for standard input.")]
Model = Annotated[
    str | None,
    Option(
        "--model", help="Model name; needed where several are served.", rich_help_panel=o.SERVER
    ),
]
System = Annotated[
    str | None, Option("--system", help="System message.", rich_help_panel=o.SAMPLING)
]
Seed = Annotated[int | None, Option("--seed", rich_help_panel=o.SAMPLING)]
Json = Annotated[bool, Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(help=THINK_HELP)(think)


def think(
    question: Asked,
    base_url: o.BaseUrl = DEFAULT_URL,
    model: Model = None,
    api_key_env: o.KeyEnv = None,
    system: System = None,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    max_tokens: o.MaxTokens = None,
    seed: Seed = None,
    keep_last_n_blocks: o.KeepLast = None,
    constrain: o.Constrain = None,
    max_blocks: o.MaxBlocks = None,
    max_block_tokens: o.MaxBlock = None,
    min_block_tokens: o.MinBlock = None,
    max_summary_tokens: o.MaxSummary = None,
    json: Json = False,
) -> None:
    options = {
        "keep_last_n_blocks": keep_last_n_blocks,
        "constrain": constrain,
        "max_blocks": max_blocks,
        "max_block_tokens": max_block_tokens,
        "min_block_tokens": min_block_tokens,
        "max_summary_tokens": max_summary_tokens,
    }
    text = _standard_input() if question == "-" else question
    if not text.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")

    # The openai package takes a second to import: not for every command, nor for a mistake.
    from memento_frontend.client import Question
    from memento_frontend.think import run

    asked = Question(
        text=text.strip(),
        base_url=base_url,
        model=model,
        key_env=api_key_env,
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        memento={name: value for name, value in options.items() if value is not None},
    )
    raise typer.Exit(run(asked, as_json=json))


def _standard_input() -> str:
    """All of standard input.

    Raises:
        BadParameter: it is no text.
    """
    import sys

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"standard input is no UTF-8 text (byte {error.start})", param_hint="QUESTION"
        ) from None
