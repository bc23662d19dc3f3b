"""Seam: nothing that JSON can carry reaches the scheduler unchecked.

Twice: a call when it arrives, before SGLang builds its requests; and each request when it is ready
to be sent, with its prompt tokenized and all defaults filled in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any, get_type_hints

import msgspec
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from memento_sgl.errors import RequestError
from memento_sgl.request.overrides import check_options, has_grammar
from memento_sgl.request.validation import (
    REQUEST_RANGES,
    UNSUPPORTED_FIELDS,
    Range,
    check_absent,
    check_embeddings,
    check_ids,
    check_names,
    check_prompts,
    check_ranges,
    check_samples,
    check_sampling,
    check_session,
)
from memento_sgl.serve.arguments import settings_of

DERIVED = {
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
}
"""Sampling parameters that SGLang fills in itself."""


def check_call(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """A plain function: the check runs when the call is made, not when its first answer is read."""
    if isinstance(obj, GenerateReqInput):
        model = manager.model_config
        _check_arrival(obj, model.vocab_size, model.hidden_size)
    return original(manager, obj, request)


def _check_arrival(obj: GenerateReqInput, vocabulary: int, width: int) -> None:
    """Check a call of one or many prompts.

    Raises:
        RequestError: with what to change; the server answers HTTP 400.
    """
    fields = vars(obj)
    check_absent(fields, UNSUPPORTED_FIELDS)
    prompts = _prompts(obj, vocabulary, width)
    count = 1 if prompts is None else prompts
    check_ranges(fields, REQUEST_RANGES | {"top_logprobs_num": Range(0, vocabulary)})
    given = obj.sampling_params
    each = given if isinstance(given, list) else [{} if given is None else given]
    if isinstance(given, list) and len(given) != prompts:
        wanted = "one prompt: give an object" if prompts is None else f"{prompts} prompts"
        raise RequestError(f"sampling_params is a list of {len(given)} for {wanted}")
    for params in each:
        _check_types(params)
        check_sampling(params, vocabulary)
    check_samples(each, count)
    session = obj.session_params
    if session is not None and not isinstance(session, dict):
        raise RequestError(f"session_params must be an object, not {type(session).__name__}")
    check_session(session, embedded=obj.input_embeds is not None)
    if obj.rid is not None:
        check_names(obj.rid, prompts)


def _prompts(obj: GenerateReqInput, vocabulary: int, width: int) -> int | None:
    """How many prompts a call has, None for one that is in no list; each is checked."""
    given = [obj.text, obj.input_ids, obj.input_embeds]
    if sum(value is not None for value in given) != 1:
        raise RequestError("give a prompt as exactly one of text, input_ids and input_embeds")
    if obj.input_ids is not None:
        check_prompts(obj.input_ids, vocabulary)
        return len(obj.input_ids) if isinstance(obj.input_ids[0], list) else None
    if obj.input_embeds is not None:
        check_embeddings(obj.input_embeds, width)
        return len(obj.input_embeds) if isinstance(obj.input_embeds[0][0], list) else None
    texts = obj.text if isinstance(obj.text, list) else [obj.text]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError("text must be a string, or a list of strings that is not empty")
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text is not valid Unicode: {error}") from None
    return len(texts) if isinstance(obj.text, list) else None


@cache
def _sampling_types() -> type[msgspec.Struct]:
    """What may be sent as sampling parameters: SGLang's own types, each one optional."""
    hints = get_type_hints(SamplingParams)
    fields = [(n, hints[n] | None, None) for n in SamplingParams.__struct_fields__]
    return msgspec.defstruct(
        "SentSamplingParams",
        [field for field in fields if field[0] not in DERIVED],
        kw_only=True,
        forbid_unknown_fields=True,
    )


def _check_types(params: Any) -> None:
    try:
        msgspec.convert(params, _sampling_types())
    except (ValueError, OverflowError) as error:
        raise RequestError(f"sampling_params: {error}") from None


def check_tokenized(tokenized: Any, manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """Check a request that is ready to be sent.

    Raises:
        RequestError: with what to change; the server answers HTTP 400.
    """
    if not isinstance(tokenized, TokenizedGenerateReqInput):
        return
    params, prompt = tokenized.sampling_params, tokenized.input_ids
    session = tokenized.session_params is not None
    if prompt is not None:
        if not prompt and not session:
            raise RequestError("the prompt has no tokens")
        check_ids("the prompt", prompt, manager.model_config.vocab_size)
    if (code := tokenized.custom_logit_processor) is not None:
        _check_processor(code)
    settings = settings_of(manager.server_args)
    assert settings is not None
    check_options(
        params.custom_params,
        None if session else prompt or (),
        settings,
        input_logprobs=bool(tokenized.return_logprob) and tokenized.logprob_start_len != -1,
        grammar=has_grammar(params, require_reasoning=obj.require_reasoning),
    )
    _check_wire(tokenized)


def _check_wire(tokenized: TokenizedGenerateReqInput) -> None:
    """SGLang's schedulers decode by type, and a field of another type ends them."""
    sent = msgspec.structs.replace(tokenized, input_ids=None, mm_inputs=None, time_stats=None)
    try:
        msgpack_decode(msgpack_encode(sent))
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"the request cannot be sent to the scheduler: {error}") from None


def _check_processor(code: str) -> None:
    """SGLang reads it again in the scheduler. What it does there is its author's."""
    try:
        CustomLogitProcessor.from_str(code)
    except Exception as error:  # unpickling raises whatever the bytes say
        raise RequestError(f"custom_logit_processor cannot be read: {error!r}") from None
