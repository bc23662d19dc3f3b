"""The `memento` command."""

from __future__ import annotations

import memento_pipeline.commands
import memento_pipeline.commands_text
import typer

app = typer.Typer(
    name="memento",
    help="Serve, drive and build data for reasoning models that manage their own context.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
memento_pipeline.commands.register(app)
memento_pipeline.commands_text.register(app)


def main() -> None:
    app()
