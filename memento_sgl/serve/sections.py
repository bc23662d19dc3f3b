"""Which tokens open and close an assistant turn of the model that is served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memento_sgl.chat_template import SPECIAL_TOKENS, renderer
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import MarkerIds
from memento_sgl.rule.markup import resolve_checked, settle_markup

logger = logging.getLogger(__name__)


def settle_sections(
    config: MementoConfig, chat_template: str | None, tokenizer: Any, vocabulary: int
) -> tuple[MementoConfig, MarkerIds]:
    """Learn the chat markup, unless the options say it, and find all markers.

    Args:
        chat_template: a file that takes the place of the tokenizer's own, or the name of one of
            SGLang's conversations, from which nothing is learned.
        tokenizer: of transformers; None: there is none.
        vocabulary: token ids that the model has.

    Returns:
        The options as they apply, which clients are told too, and the tokens.

    Raises:
        MarkerError: the markup cannot be learned, or a marker is not in the vocabulary.
    """
    source = _source(chat_template, tokenizer)
    render: Callable[..., str] | None = None
    added: dict[str, int] = {}
    if tokenizer is not None:
        added = tokenizer.get_added_vocab()
        if source:
            special = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
            known = {name: text for name, text in special.items() if isinstance(text, str)}
            render = renderer(source, known)
    config, markup = settle_markup(config, render, source, added)
    markers = resolve_checked(config, markup, tokenizer, vocabulary)
    if config.require_assistant_section:
        logger.info(
            "memento: an assistant turn opens with %r %s and closes with %r (%s)",
            config.im_start_token + config.assistant_token,
            list(markers.header),
            config.im_end_token,
            "as said or by default" if markup is None else "learned from the chat template",
        )
    return config, markers


def _source(chat_template: str | None, tokenizer: Any) -> str:
    if chat_template is not None:
        file = Path(chat_template)
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    return own if isinstance(own, str) else ""
