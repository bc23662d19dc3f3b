"""Seam: thought and answer apart in OpenAI responses, with or without markers."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from memento_sgl.request.overrides import options_of
from memento_sgl.serve.arguments import REASONING_PARSER, settings_of
from memento_sgl.serve.reasoning_parser import MementoDetector


def adapt_parser(
    _result: None,
    parser: Any,
    model_type: str | None = None,
    stream_reasoning: bool = True,
    force_reasoning: bool | None = None,
    request: Any = None,
    tokenizer: Any = None,
    **_kwargs: Any,
) -> None:
    if request is None or tokenizer is None or not isinstance(parser.detector, MementoDetector):
        return
    from sglang.srt.runtime_context import get_server_args

    parser.detector.adapt(
        _markers(get_server_args(), tokenizer),
        show_markers=_shows_markers(get_server_args(), request),
        opened=_prompt_end(request, tokenizer).endswith(parser.detector.think_start_token),
    )


def keep_tags(_result: None, serving: Any, request: Any) -> None:
    """Special tokens vanish from text: keep them where the parser has to see or show them."""
    if serving.reasoning_parser != REASONING_PARSER:
        return
    manager = serving.tokenizer_manager
    detector = serving._reasoning_detector
    needed = [detector.think_start_token, detector.think_end_token]
    if _shows_markers(manager.server_args, request):
        needed += _markers(manager.server_args, manager.tokenizer)
    if any(_vanishes(tag, manager.tokenizer) for tag in needed):
        request.skip_special_tokens = False


def _markers(server_args: Any, tokenizer: Any) -> list[str]:
    settings = settings_of(server_args)
    assert settings is not None
    return [tokenizer.decode([token]) for token in settings.markers[:4]]


def _shows_markers(server_args: Any, request: Any) -> bool:
    settings = settings_of(server_args)
    assert settings is not None
    options = options_of(getattr(request, "custom_params", None))
    return settings.config.for_request(options).show_markers


def _prompt_end(request: Any, tokenizer: Any) -> str:
    """How the prompt ends: with `<think>` the answer lacks it."""
    if ids := getattr(request, "input_ids", None):
        prompt = tokenizer.decode(ids[-8:])
    elif tokenizer.chat_template is None:
        return ""
    else:
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}],
                tokenize=False,
                add_generation_prompt=True,
                **(getattr(request, "chat_template_kwargs", None) or {}),
            )
        except TemplateError:  # it wants another conversation than this one
            return ""
    return str(prompt).rstrip()


def _vanishes(tag: str, tokenizer: Any) -> bool:
    ids = tokenizer.encode(tag, add_special_tokens=False)
    return tag not in tokenizer.decode(ids, skip_special_tokens=True)
