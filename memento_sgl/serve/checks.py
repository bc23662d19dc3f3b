"""What can be wrong with `memento serve`, found before SGLang is imported, which takes long."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memento_sgl.environment import hub_is_offline, other_hub
from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import DELIMITERS_KEY
from memento_sgl.serve.memento_flags import add_flags, config_from_flags
from memento_sgl.serve.sglang_flags import FlagParser, flag_parser

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def serve_parser() -> FlagParser:
    """SGLang's flags and the memento group, which comes first."""
    parser = flag_parser()
    add_flags(parser)
    parser._action_groups.insert(0, parser._action_groups.pop())
    return parser


def check(model: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Check `memento serve MODEL ARGUMENTS`.

    Returns:
        What the flags say, SGLang's defaults where they say nothing.

    Raises:
        ConfigError: a flag that does not exist or misses its value, options that contradict each
            other, no such model, a port that is taken or none.
    """
    options = parse(arguments)
    config = config_from_flags(options)
    found = check_model(model, options)
    if config is not None and (architectures := found.get("architectures")):
        config.for_family(architectures, found.get(DELIMITERS_KEY))
    if options.config is None:  # SGLang's own file may name another
        check_port(options.host, options.port)
    return options


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags behind `memento serve MODEL`.

    Raises:
        ConfigError: as `check`.
    """
    parser = serve_parser()
    options, rest = parser.parse_known_args([*arguments, "--enable-memento"])
    if rest:
        raise ConfigError(_unknown(rest[0], parser.flags))
    if options.model_path is not None:
        raise ConfigError("the model is the first argument: leave out --model-path")
    return options


def _unknown(word: str, flags: list[str]) -> str:
    if not word.startswith("-"):
        return f"what is {word!r}? One model is served; everything else is a flag"
    name = word.partition("=")[0]
    longer = [flag for flag in flags if flag.startswith(name)]
    close = difflib.get_close_matches(name, flags, n=1) or longer[:1]
    return f"no such flag: {name}" + (f" (did you mean {close[0]}?)" if close else "")


def check_model(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Check that there is a checkpoint; returns config.json of one on this disk, else nothing.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(model)
    if folder.is_dir():
        return _check_folder(folder, options)
    if folder.is_file() or "://" in model or other_hub():
        return {}  # one GGUF file, an object store, another hub: SGLang's own business
    if model.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(model):
        raise ConfigError(f"no model at {model}: give a checkpoint folder, or demo")
    _check_hub(model, options.revision)
    return {}


def _check_folder(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found["architectures"] = [str(name) for name in found.get("architectures") or ()]
    except FileNotFoundError:
        if list(folder.glob("*.gguf")) or (folder / "params.json").is_file():
            return {}
        raise ConfigError(f"{folder} is no checkpoint: it has no config.json") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} cannot be used: {error}") from None
    if options.load_format != "dummy" and not any(any(folder.glob(p)) for p in WEIGHTS):
        raise ConfigError(f"{folder} is no checkpoint: it holds no weights ({', '.join(WEIGHTS)})")
    return found


def _check_hub(model: str, revision: str | None) -> None:
    from huggingface_hub import file_exists, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
        return
    missing = f"no model {model}: there is no such folder, and "
    if hub_is_offline():
        raise ConfigError(f"{missing}Hugging Face may not be asked (HF_HUB_OFFLINE)")
    try:
        there = file_exists(model, "config.json", revision=revision)
    except Exception as error:  # whatever its HTTP library raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{missing}Hugging Face does not answer ({reason})") from None
    if not there:
        raise ConfigError(
            f"{missing}Hugging Face has none of that name, or shows it to others only"
        )


def check_port(host: str, port: int) -> None:
    """Raise ConfigError unless a server can listen there."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port}: ports are 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use: stop what listens there, or take another --port"
            ) from None
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}"
        ) from None
