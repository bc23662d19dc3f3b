"""The user's configuration file: defaults of options, so that they need not be typed again.

    base_url = "http://gpu-1:30000"     # all commands that ask a server
    api_key_env = "MEMENTO_API_KEY"

    [think]                             # options of one command, by their names
    temperature = 0.6

    [serve]                             # also SGLang's flags and the --memento-* options
    memento-keep-last-n-blocks = 1

What is on the command line wins, then environment variables, then this file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memento_sgl.environment import base_url, config_path
from memento_sgl.errors import ConfigError

SHARED = ("base_url", "api_key_env")
"""Keys outside any table; for commands that have an option of that name."""
OPEN = "serve"  # takes keys that are no options of its own: flags of SGLang


def load(path: Path | None = None) -> dict[str, Any]:
    """The file's content, keys with underscores; empty if there is none.

    Args:
        path: None: `MEMENTO_CONFIG`, else `memento/config.toml` in the user's configuration folder.

    Raises:
        ConfigError: it cannot be read, is not TOML, or a named file does not exist.
    """
    named, default = config_path()
    path = path or named or default
    if path != named and not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no text at all
        raise ConfigError(f"configuration file {path} is not TOML: {error}") from None
    return {key: _underscored(value) for key, value in _underscored(found).items()}


def defaults(options: Mapping[str, set[str]], asking: set[str]) -> dict[str, dict[str, Any]]:
    """Defaults by command.

    Args:
        options: names of the options that each command has.
        asking: commands that ask a Memento server: the shared keys are for them.

    Raises:
        ConfigError: an unknown command or option, named.
    """
    found = load()
    tables = {key: value for key, value in found.items() if isinstance(value, dict)}
    shared = {key: value for key, value in found.items() if key not in tables}
    _known("key", shared, SHARED)
    _known("command", tables, options)
    for command, table in tables.items():
        if command != OPEN:
            _known(f"option of [{command}]", table, options[command])
    return {
        command: {name: shared[name] for name in shared if command in asking and name in names}
        | tables.get(command, {})
        for command, names in options.items()
    }


def default_base_url() -> str | None:
    """The server that is meant when none is named: of the environment, else of the file."""
    url = base_url() or load().get("base_url")
    return None if url is None else str(url)


def as_flags(table: Mapping[str, Any], own: set[str]) -> list[str]:
    """Flags of SGLang's command line for the keys of `[serve]` that are none of its `own`."""
    flags = []
    for name, value in table.items():
        if name in own:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name.startswith("memento_") and isinstance(value, bool):
            flags += [flag, str(value).lower()]
        elif isinstance(value, bool):
            flags += [flag] if value else []
        else:
            values = value if isinstance(value, list) else [value]
            flags += [flag, *map(str, values)]
    return flags


def _underscored(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key.replace("-", "_"): inner for key, inner in value.items()}


def _known(what: str, given: Mapping[str, Any], known: Any) -> None:
    if unknown := sorted(set(given) - set(known)):
        listed = ", ".join(sorted(known))
        raise ConfigError(f"configuration file: no {what} {unknown[0]!r}; there are: {listed}")
