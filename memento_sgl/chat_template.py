"""Chat templates rendered as transformers renders them, without transformers.

The environment is that of `transformers.utils.chat_template_utils`: sandboxed, loop controls,
`{% generation %}` around what the assistant says, `raise_exception`, `strftime_now`, a `tojson`
that escapes no HTML.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memento_sgl.errors import ConfigError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
"""Variables that a tokenizer gives to its chat template."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


class Generation(Extension):
    """`{% generation %}`: a mark for trainers, which does not change the text."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_said")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


def chat_environment() -> ImmutableSandboxedEnvironment:
    """An environment to compile chat templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def template_of_folder(folder: Path) -> str | None:
    """The chat template in a tokenizer's folder; None where there is none.

    Raises:
        ConfigError: a file that cannot be read.
    """
    if (file := folder / TEMPLATE).is_file():
        return file.read_text(encoding="utf-8")
    source = tokenizer_config(folder).get("chat_template")
    if isinstance(source, list):  # several by name, as transformers 4 wrote them
        named = {each.get("name"): each.get("template") for each in source}
        source = named.get("default")
    return source if isinstance(source, str) else None


def special_tokens_of(folder: Path) -> dict[str, str]:
    """Special tokens by the configuration in a tokenizer's folder.

    Raises:
        ConfigError: it cannot be read.
    """
    config = tokenizer_config(folder)
    given = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder; empty where there is none.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        found = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{folder / TOKENIZER_CONFIG} is not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def renderer(source: str, special: dict[str, str]) -> Callable[..., str]:
    """A function that renders a chat template as a Hugging Face tokenizer does.

    Raises:
        ConfigError: it is not valid.
    """
    try:
        compiled = chat_environment().from_string(source)
    except TemplateError as error:
        raise ConfigError(f"the chat template is not valid jinja: {error}") from None
    given = {"tools": None, "documents": None, **special}
    return lambda **values: compiled.render(**(given | values))
