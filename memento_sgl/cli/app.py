"""The `memento` command. Nothing heavy is imported before a command runs: `memento --help` and a
mistyped option answer at once."""

from __future__ import annotations

import sys
from typing import Annotated

import memento_frontend.commands
import memento_frontend.commands_batch
import memento_frontend.commands_eval
import memento_frontend.commands_ui
import memento_pipeline.cli.convert
import memento_pipeline.cli.text
import typer

import memento_sgl.cli.offline
import memento_sgl.cli.serve
import memento_sgl.cli.trace
import memento_sgl.cli.train
from memento_sgl import __version__
from memento_sgl.errors import MementoError

ASKING = {"think", "batch", "eval", "ui"}  # commands that ask a Memento server
USAGE, INTERRUPTED = 2, 130  # exit codes
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="memento",
    help="Serve, drive and build data for reasoning models that manage their own context.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
memento_sgl.cli.serve.register(app)
memento_sgl.cli.trace.register(app)
memento_frontend.commands.register(app)
memento_frontend.commands_batch.register(app)
memento_frontend.commands_eval.register(app)
memento_frontend.commands_ui.register(app)
memento_sgl.cli.offline.register(app)
memento_pipeline.cli.convert.register(app)
memento_pipeline.cli.text.register(app)
memento_sgl.cli.train.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"memento-sgl {__version__}")
        raise typer.Exit


@app.callback()
def memento(
    ctx: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print it.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    from memento_sgl.cli.user_config import defaults

    commands = ctx.command.commands  # type: ignore[attr-defined]
    options = {name: {str(p.name) for p in part.params} for name, part in commands.items()}
    ctx.default_map = defaults(options, ASKING)


def main() -> None:
    """Run the command line. A mistake, or Ctrl-C at any moment, is one line on standard error."""
    try:
        sys.exit(app(prog_name="memento", standalone_mode=False))
    except UsageError as error:
        ctx = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(ctx.get_help() if ctx else error)
        else:
            where = ctx.command_path if ctx is not None else "memento"
            print(f"{where}: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
        code = USAGE
    except MementoError as error:
        print(f"memento: {error}", file=sys.stderr)
        code = USAGE if isinstance(error, ValueError) else 1
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
