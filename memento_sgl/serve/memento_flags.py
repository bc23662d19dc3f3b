"""Flags of the command line to a `MementoConfig`."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--enable-memento`, `--memento-config` and one flag for each option."""
    group = parser.add_argument_group("memento: in-place eviction of finished reasoning blocks")
    group.add_argument("--enable-memento", action="store_true", help="Evict finished blocks.")
    group.add_argument(
        "--memento-config",
        metavar="JSON-OR-PATH",
        help="Options as a JSON object or the path of a JSON file; the flags below override it.",
    )
    for name, field in MementoConfig.model_fields.items():
        if name == "enable":
            continue
        kinds = _kinds(field.annotation)
        group.add_argument(
            f"--memento-{name.replace('_', '-')}",
            dest=f"memento_{name}",
            metavar="/".join(kinds),
            help=f"{(field.description or '').replace('%', '%%')} (default: {field.default})",
        )


def _kinds(annotation: Any) -> list[str]:
    """Names of the types or values that an option accepts."""
    if annotation is bool:
        return ["true", "false"]
    if isinstance(annotation, type):
        return [annotation.__name__]
    parts = get_args(annotation)
    return [kind for part in parts for kind in ([part] if isinstance(part, str) else _kinds(part))]


def config_from_flags(args: argparse.Namespace) -> MementoConfig | None:
    """The options of a launch; None when memento is not asked for.

    Raises:
        ConfigError: bad JSON, unknown option, wrong type, contradiction, options without enabling.
    """
    given: dict[str, Any] = {}
    for name, field in MementoConfig.model_fields.items():
        text = getattr(args, f"memento_{name}", None)
        if text is not None:
            given[name] = _value(name, text, field.annotation)
    source = getattr(args, "memento_config", None)
    base = MementoConfig.parse(source) if source is not None else MementoConfig()
    enabled = bool(getattr(args, "enable_memento", False))
    if enabled and "enable" in base.model_fields_set and not base.enable:
        raise ConfigError('--enable-memento contradicts "enable": false in --memento-config')
    if not (enabled or base.enable):
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ConfigError(f"--memento-{flag} has no effect without --enable-memento")
        return None
    return MementoConfig.parse(base.model_dump(exclude_unset=True) | given | {"enable": True})


def _value(name: str, text: str, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    if "true" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if annotation is int:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(
                f"--memento-{name.replace('_', '-')}: not a number: {text!r}"
            ) from None
    if annotation is str or text in kinds:
        return text
    raise ConfigError(
        f"--memento-{name.replace('_', '-')}: expected {' or '.join(kinds)}, not {text!r}"
    )
