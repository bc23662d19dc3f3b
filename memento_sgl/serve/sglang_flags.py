"""SGLang's command line flags, listed once: importing SGLang to ask for them takes many seconds.

    python -m memento_sgl.serve.sglang_flags      # writes the list of the SGLang that is installed

`sglang_flags.json` is the list of the one supported version; a test compares it with SGLang.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from memento_sgl.errors import ConfigError

FILE = Path(__file__).parent / "sglang_flags.json"
OURS = ("--memento-", "--enable-memento")
_KINDS = {"int": int, "float": float}


class FlagParser(argparse.ArgumentParser):
    """A mistake is a ConfigError instead of pages of usage."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, add_help=False, usage=argparse.SUPPRESS)
        full_names_only(self)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    @property
    def flags(self) -> list[str]:
        """All flags that it knows."""
        return list(self._option_string_actions)


def full_names_only(parser: argparse.ArgumentParser) -> None:
    """argparse takes the beginning of a flag for the flag, and `--tp 2` is common. But a typo in a
    memento flag must not pass as another one."""
    matches = parser._get_option_tuples

    def matching(text: str) -> list[Any]:
        return [match for match in matches(text) if not match[1].startswith(OURS)]

    vars(parser)["_get_option_tuples"] = matching


def listed() -> dict[str, Any]:
    """`{"version": ..., "flags": [...]}` of the file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def flag_parser(prog: str = "memento serve") -> FlagParser:
    """A parser that knows what the list knows. It leaves choices to SGLang, whose plugins add
    some."""
    parser = FlagParser(prog)
    group = parser.add_argument_group(f"SGLang {listed()['version']}")
    for flag in listed()["flags"]:
        more: dict[str, Any] = {"help": flag["help"].replace("%", "%%"), "default": flag["default"]}
        if flag["nargs"] == 0:
            more["action"] = "store_true"
        else:
            more |= {"nargs": flag["nargs"], "type": _KINDS.get(flag["kind"], str)}
            more["metavar"] = flag["metavar"]
        group.add_argument(*flag["names"], dest=flag["dest"], **more)
    return parser


def describe(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """The flags of a parser as data: all but --help."""
    formatter = parser.formatter_class(prog="")
    found = []
    for action in parser._actions:
        if not action.option_strings or "--help" in action.option_strings:
            continue
        kind = getattr(action.type, "__name__", "str")
        valued = action.nargs != 0 and type(action).__name__ != "DeprecatedStoreConstAction"
        plain = isinstance(action.default, (str, int, float, bool, type(None)))
        if isinstance(action.choices, (set, frozenset)):
            action.choices = sorted(action.choices)  # a set has another order in each process
        found.append(
            {
                "names": list(action.option_strings),
                "dest": action.dest,
                "nargs": action.nargs if valued else 0,
                "kind": kind if kind in _KINDS else "str",
                "metavar": formatter._format_args(action, action.dest.upper()).split(" [")[0]
                if valued and action.nargs is None
                else None,
                "default": action.default if plain else None,
                "help": formatter._expand_help(action) if action.help else "",
            }
        )
    return found


def installed() -> dict[str, Any]:
    """The list of the SGLang that is installed; imports it."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {"version": version("sglang"), "flags": describe(parser)}


if __name__ == "__main__":
    now = installed()
    lines = ",\n".join(json.dumps(flag) for flag in now["flags"])
    text = f'{{"version": "{now["version"]}", "flags": [\n{lines}\n]}}\n'
    FILE.write_text(text, encoding="utf-8")
    print(f"wrote {FILE}", file=sys.stderr)
