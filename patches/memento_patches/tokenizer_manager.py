"""Seam: requests come in, answers go out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memento_patches.output import KEY
from memento_sgl.request import check_options
from memento_sgl.serving import settings_of

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
"""Sampling parameters that constrain the output."""


def check_request(
    manager: Any, obj: Any, _input_text: Any, input_ids: Any = None, *_args: Any, **_kwargs: Any
) -> None:
    params = getattr(obj, "sampling_params", None)
    if not isinstance(params, dict) or input_ids is None:
        return
    settings = settings_of(manager.server_args)
    assert settings is not None
    logprobs = getattr(obj, "return_logprob", False) and obj.logprob_start_len not in (None, -1)
    grammar = any(params.get(kind) for kind in GRAMMARS) and not obj.require_reasoning
    check_options(
        params.get("custom_params"), input_ids, settings, input_logprobs=logprobs, grammar=grammar
    )


def add_record(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: Any,
) -> None:
    """SGLang would gather a list of values per token; the accounting is one value per request."""
    others = {key: values for key, values in customized_info.items() if key != KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    for record in customized_info.get(KEY, {index: ()})[index]:
        meta_info[KEY] = record
