"""`memento think`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer
from typer import Option

SERVER = "Server"
SAMPLING = "Sampling (left out: the server's defaults)"
MEMENTO = "Memento options of this request (left out: the server's)"
DEFAULT_URL = "http://127.0.0.1:30000/v1"

THINK_HELP = """Ask one question and watch the thought: blocks fold into mementos, KV goes down.

Needs a running server, by default the one of `memento serve MODEL` on this machine:

    memento serve demo --port 30000

    memento think "Total mod 100? a372 b91 c55"

Any OpenAI-compatible server works; without mementos there is just less to see:

    memento think "Why is the sky blue?" --base-url https://HOST/v1 --model NAME --api-key-env KEY

The question may come from standard input; --json prints one object for scripts:

    memento think - --json --temperature 0 --max-tokens 4096 < question.txt

Keep the last two blocks; force well-formed blocks of at most 512 tokens:

    memento think "..." --keep-last-n-blocks 2 --constrain strict --max-block-tokens 512

Ctrl-C stops and keeps what was produced. Exit code: 0 answered, 1 the server did not answer,
refused or broke off, 2 usage, 130 interrupted.
"""

Asked = Annotated[str, typer.Argument(help="The question, or - for standard input.")]
BaseUrl = Annotated[
    str, Option("--base-url", help="Address of the server, .../v1.", rich_help_panel=SERVER)
]
Model = Annotated[
    str | None,
    Option("--model", help="Model name; needed where several are served.", rich_help_panel=SERVER),
]
KeyEnv = Annotated[
    str | None,
    Option(
        "--api-key-env",
        help="NAME of the variable that holds the key; default MEMENTO_API_KEY.",
        rich_help_panel=SERVER,
    ),
]
System = Annotated[str | None, Option("--system", help="System message.", rich_help_panel=SAMPLING)]
Temperature = Annotated[
    float | None, Option("--temperature", min=0, help="0: greedy.", rich_help_panel=SAMPLING)
]
TopP = Annotated[float | None, Option("--top-p", min=0, max=1, rich_help_panel=SAMPLING)]
MaxTokens = Annotated[
    int | None,
    Option("--max-tokens", min=1, help="Of thought and answer.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int | None, Option("--seed", rich_help_panel=SAMPLING)]
KeepLast = Annotated[
    int | None,
    Option(
        "--keep-last-n-blocks",
        min=-1,
        help="N newest blocks stay; -1: nothing is evicted.",
        rich_help_panel=MEMENTO,
    ),
]


class Constraint(StrEnum):
    OFF = "off"
    CAPS = "caps"
    STRICT = "strict"


Constrain = Annotated[
    Constraint | None,
    Option(
        "--constrain",
        help="Hold the model to the caps, or to well-formed blocks throughout.",
        rich_help_panel=MEMENTO,
    ),
]
MaxBlocks = Annotated[
    int | None, Option("--max-blocks", min=0, help="In one answer.", rich_help_panel=MEMENTO)
]
MaxBlock = Annotated[
    int | None,
    Option("--max-block-tokens", min=0, help="Force a block's end.", rich_help_panel=MEMENTO),
]
MinBlock = Annotated[
    int | None,
    Option("--min-block-tokens", min=0, help="No block ends before.", rich_help_panel=MEMENTO),
]
MaxSummary = Annotated[
    int | None,
    Option("--max-summary-tokens", min=0, help="Force a memento's end.", rich_help_panel=MEMENTO),
]
Json = Annotated[bool, Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(help=THINK_HELP)(think)


def think(
    question: Asked,
    base_url: BaseUrl = DEFAULT_URL,
    model: Model = None,
    api_key_env: KeyEnv = None,
    system: System = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    keep_last_n_blocks: KeepLast = None,
    constrain: Constrain = None,
    max_blocks: MaxBlocks = None,
    max_block_tokens: MaxBlock = None,
    min_block_tokens: MinBlock = None,
    max_summary_tokens: MaxSummary = None,
    json: Json = False,
) -> None:
    # The openai package takes a second to import: not for every command.
    from memento_frontend.client import Question
    from memento_frontend.think import run

    options = {
        "keep_last_n_blocks": keep_last_n_blocks,
        "constrain": constrain,
        "max_blocks": max_blocks,
        "max_block_tokens": max_block_tokens,
        "min_block_tokens": min_block_tokens,
        "max_summary_tokens": max_summary_tokens,
    }
    text = sys.stdin.read() if question == "-" else question
    if not text.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
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
