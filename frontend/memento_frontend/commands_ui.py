"""`memento ui`."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer
from typer import Option

from memento_frontend.cli_options import BaseUrl, KeyEnv
from memento_frontend.commands import Model
from memento_sgl.address import DEFAULT_URL

DEFAULT_PORT = 30010

UI_HELP = f"""Watch models think in the browser: a page in front of any OpenAI-compatible server.

`memento serve` has the same page at /memento on its own port. This command is for servers that have
none, are elsewhere, or need an API key, which then stays in this process:

    memento ui --base-url https://HOST/v1 --model NAME --api-key-env KEY --open

Opens port {DEFAULT_PORT} of the loopback interface only. Pages of other sites cannot use it;
programs of all users of this machine can.

Exit code: 0 after Ctrl-C, 2 usage.
"""

Port = Annotated[int, Option("--port", min=0, max=65535, help="Of this machine; 0: any free one.")]
Open = Annotated[bool, Option("--open", help="Open the page in a browser.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(help=UI_HELP)(ui)


def ui(
    base_url: BaseUrl = DEFAULT_URL,
    model: Model = None,
    api_key_env: KeyEnv = None,
    port: Port = DEFAULT_PORT,
    open_: Open = False,
) -> None:
    # Web servers and clients take a second to import: not for every command.
    from memento_frontend.client import key_of
    from memento_frontend.ui import Upstream, serve

    def ready(address: str) -> None:
        typer.echo(f"{address}  (Ctrl-C ends it)")
        if open_:
            webbrowser.open(address)

    serve(Upstream(base_url, key_of(api_key_env), model), port, ready)
