"""Command line options that `memento think` and `memento batch` share, defined once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from typer import Option

from memento_sgl.address import BASE_URL_ENV, BASE_URL_HELP

SERVER = "Server"
SAMPLING = "Sampling (left out: the server's defaults)"
MEMENTO = "Memento options of the request (left out: the server's)"


class Constraint(StrEnum):
    OFF = "off"
    CAPS = "caps"
    STRICT = "strict"


BaseUrl = Annotated[
    str,
    Option("--base-url", help=BASE_URL_HELP, envvar=BASE_URL_ENV, rich_help_panel=SERVER),
]
KeyEnv = Annotated[
    str | None,
    Option(
        "--api-key-env",
        help="NAME of the variable that holds the key; default MEMENTO_API_KEY.",
        rich_help_panel=SERVER,
    ),
]
Temperature = Annotated[
    float | None, Option("--temperature", min=0, help="0: greedy.", rich_help_panel=SAMPLING)
]
TopP = Annotated[float | None, Option("--top-p", min=0, max=1, rich_help_panel=SAMPLING)]
MaxTokens = Annotated[
    int | None,
    Option("--max-tokens", min=1, help="Of thought and answer.", rich_help_panel=SAMPLING),
]
KeepLast = Annotated[
    int | None,
    Option(
        "--keep-last-n-blocks",
        min=-1,
        help="N newest blocks stay; -1: nothing is evicted.",
        rich_help_panel=MEMENTO,
    ),
]
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
