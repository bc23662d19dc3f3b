"""The `memento` command."""

from __future__ import annotations

import memento_frontend.commands
import memento_frontend.commands_batch
import memento_frontend.commands_eval
import memento_frontend.commands_ui
import memento_pipeline.commands
import memento_pipeline.commands_text
import typer

import memento_sgl.commands
import memento_sgl.commands_offline
import memento_sgl.commands_trace

app = typer.Typer(
    name="memento",
    help="Serve, drive and build data for reasoning models that manage their own context.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
memento_sgl.commands.register(app)
memento_sgl.commands_trace.register(app)
memento_frontend.commands.register(app)
memento_frontend.commands_batch.register(app)
memento_frontend.commands_eval.register(app)
memento_frontend.commands_ui.register(app)
memento_sgl.commands_offline.register(app)
memento_pipeline.commands.register(app)
memento_pipeline.commands_text.register(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
