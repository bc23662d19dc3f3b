"""Training text of a row by a chat template, split where the model begins to speak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memento_sgl.errors import ConfigError
from memento_sgl.templates import template as project_template


class ChatTemplate:
    """A jinja chat template, rendered as Hugging Face tokenizers do."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _tojson
        try:
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid jinja: {error}") from None
        self.source = source
        self.chat_markup = "<|im_start|>" in source

    def render(self, problem: str, response: str) -> tuple[str, str]:
        """Prompt (ends where the model begins) and the rest of the conversation, end included.

        Raises:
            ConfigError: the template refuses the messages, changes the response or does not
                continue its own prompt.
        """
        asked = [{"role": "user", "content": problem}]
        try:
            prompt = self._template.render(messages=asked, add_generation_prompt=True)
            text = self._template.render(
                messages=[*asked, {"role": "assistant", "content": response}],
                add_generation_prompt=False,
            )
        except TemplateError as error:
            raise ConfigError(f"the chat template failed: {error}") from None
        if not text.startswith(prompt) or not text[len(prompt) :].startswith(response):
            raise ConfigError(
                "the chat template does not keep the response as it is after its own prompt (many "
                "reasoning templates remove thoughts): train with memento_nosys or memento"
            )
        return prompt, text[len(prompt) :].rstrip("\n")


def load_template(source: str) -> ChatTemplate:
    """A template of this project by name, or one from a file.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    path = Path(source)
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat template {source!r} cannot be read: {error}") from None
    try:
        return ChatTemplate(project_template(source))
    except FileNotFoundError as error:
        raise ConfigError(f"chat template {source!r}: {error}") from None


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
