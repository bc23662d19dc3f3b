"""Seam: command line flags and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from memento_patches.plugin import install
from memento_sgl.errors import MementoError
from memento_sgl.serve.arguments import NO_PARSER, enable, required_arguments
from memento_sgl.serve.memento_flags import add_flags, config_from_flags
from memento_sgl.serve.sglang_flags import full_names_only


def add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    full_names_only(parser)
    action = parser._option_string_actions["--reasoning-parser"]
    action.choices = [*(action.choices or ()), NO_PARSER]
    action.help = f"{action.help} With --enable-memento the default is memento; none: no parser."


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    try:
        config = config_from_flags(args)
        if config is not None:
            vars(args).update(required_arguments(config, vars(args)))
        elif args.reasoning_parser == NO_PARSER:
            args.reasoning_parser = None
        server_args = original(cls, args)
        if config is not None:
            enable(server_args, config)
            if config.page:
                install("page")
    except MementoError as error:
        raise SystemExit(f"memento: {error}") from None
    return server_args
