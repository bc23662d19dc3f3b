"""Training text of a row by a chat template, split where the model begins to speak."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from jinja2 import TemplateError, meta

from memento_sgl.chat_template import (
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER_CONFIG,
    chat_environment,
    renderer,
    special_tokens_of,
    template_of_folder,
)
from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markup import Markup, settle_markup
from memento_sgl.templates import template as project_template


class ChatTemplate:
    """A jinja chat template, rendered as Hugging Face tokenizers do.

    Args:
        special: values of `SPECIAL_TOKENS`; None: there is no tokenizer to ask.

    Raises:
        ConfigError: it is not valid, or uses special tokens that nobody has told.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        self._render = renderer(source, dict(special or {}))
        used = meta.find_undeclared_variables(chat_environment().parse(source))
        if special is None and (unknown := sorted(used.intersection(SPECIAL_TOKENS))):
            raise ConfigError(
                f"the chat template uses {', '.join(unknown)}: put the {TOKENIZER_CONFIG} of the "
                "tokenizer beside it, or give --train-tokenizer a folder that has one"
            )
        self.source = source
        self.chat_markup = "<|im_start|>" in source

    def settle(
        self, config: MementoConfig, added: Collection[str]
    ) -> tuple[MementoConfig, Markup | None]:
        """`config` with the markup of this template; see `settle_markup`."""
        return settle_markup(config, self._render, self.source, added)

    def render(self, problem: str, response: str) -> tuple[str, str]:
        """Prompt (ends where the model begins) and the rest of the conversation, end included.

        Raises:
            ConfigError: the template refuses the messages, changes the response or does not
                continue its own prompt.
        """
        asked = [{"role": "user", "content": problem}]
        answered = [*asked, {"role": "assistant", "content": response}]
        try:
            prompt = self._render(messages=asked, add_generation_prompt=True)
            text = self._render(messages=answered, add_generation_prompt=False)
        except TemplateError as error:
            raise ConfigError(f"the chat template failed: {error}") from None
        if not text.startswith(prompt) or not text[len(prompt) :].startswith(response):
            raise ConfigError(
                "the chat template does not keep the response as it is after its own prompt (many "
                "reasoning templates remove thoughts): train with memento_nosys or memento"
            )
        return prompt, text[len(prompt) :].rstrip("\n")


def load_template(source: str, tokenizer: Path | None = None) -> ChatTemplate:
    """A template of this project by name, or one from a file or the folder of a checkpoint.

    Args:
        tokenizer: tokenizer.json or its folder, whose configuration knows the special tokens where
            none lies beside the template.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    path = Path(source)
    if path.is_dir():
        return ChatTemplate(_of_folder(path), _special(path))
    if path.is_file():
        special = _special(path.parent)
        if special is None and tokenizer is not None:
            special = _special(tokenizer if tokenizer.is_dir() else tokenizer.parent)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat template {source!r} cannot be read: {error}") from None
        return ChatTemplate(text, special)
    try:
        return ChatTemplate(project_template(source))
    except FileNotFoundError as error:
        raise ConfigError(f"chat template {source!r}: {error}") from None


def _of_folder(folder: Path) -> str:
    source = template_of_folder(folder)
    if source is None:
        raise ConfigError(
            f"{folder} holds neither {TEMPLATE} nor a chat template in {TOKENIZER_CONFIG}"
        )
    return source


def _special(folder: Path) -> dict[str, str] | None:
    """Special tokens by the configuration in a folder; None where there is none."""
    return special_tokens_of(folder) if (folder / TOKENIZER_CONFIG).is_file() else None
