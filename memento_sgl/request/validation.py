"""What a request may carry into the server: shapes of prompts, ranges of numbers. Plain Python.

SGLang reads most of a request where it runs the model: a number that no tensor holds, an id outside
of the vocabulary or a field that only its own processes fill ends the scheduler there, and with it
every other request. `memento_patches.requests_in` asks here first.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memento_sgl.errors import RequestError
from memento_sgl.rule.config import LARGEST, shown


class Range(NamedTuple):
    """Least and greatest value of a number, both allowed."""

    low: float
    high: float


MOST_SAMPLES = 4096
MOST_REQUESTS = 1 << 16
"""Requests that one call with `n` may become: all of them are built before the first is sent."""
INT64 = Range(-(1 << 63), (1 << 63) - 1)

SAMPLING_RANGES = {
    "max_new_tokens": Range(0, LARGEST),
    "min_new_tokens": Range(0, LARGEST),
    "temperature": Range(0, 1e6),  # float32: logits of -inf divided by inf are not numbers
    "top_p": Range(0, 1),
    "top_k": Range(-1, 1 << 30),
    "min_p": Range(0, 1),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "repetition_penalty": Range(0.01, 2),  # logits are divided by it
    "n": Range(1, MOST_SAMPLES),
    "stream_interval": Range(1, LARGEST),
    "sampling_seed": INT64,
}
"""Every number among SGLang's sampling parameters."""
LOGIT_BIAS = Range(-1e9, 1e9)

REQUEST_RANGES = {
    "logprob_start_len": Range(-1, LARGEST),
    "routed_experts_start_len": Range(0, LARGEST),
    "routed_dp_rank": Range(0, LARGEST),
    "data_parallel_rank": Range(0, LARGEST),
    "max_thinking_tokens": Range(-1, LARGEST),
    "disagg_prefill_dp_rank": Range(0, LARGEST),
    "decode_tp_size": Range(1, LARGEST),
    "bootstrap_port": Range(0, 65535),
    "bootstrap_room": Range(0, INT64.high),
    "priority": Range(-LARGEST, LARGEST),
}
"""Numbers beside the sampling parameters; `top_logprobs_num` ends at the vocabulary."""

UNSUPPORTED_FIELDS = {
    "lora_id": "the server finds it: give lora_path",
    "http_worker_ipc": "it belongs to SGLang's own processes",
    "need_wait_for_mm_inputs": "it belongs to SGLang's own processes",
    "num_items_assigned": "it belongs to SGLang's own processes",
    "kv_hints": "no storage behind the cache is supported",
    "watermark": "watermarks are not supported",
    "encoder_urls": "it belongs to SGLang's own processes",
    "token_type_ids": "models that decode have none",
    "multi_item_delimiter_indices": "scoring of several items in one prompt is not supported",
    "token_indices_to_pool": "scoring of positions of a prompt is not supported",
    "positional_embed_overrides": "embeddings in place of tokens are not supported",
}
"""Fields that must be absent, and why."""
UNSUPPORTED_SAMPLING = {
    "beam_width": "beam search is not supported",
    "watermark": "watermarks are not supported",
}
"""Sampling parameters that must be absent, and why."""


def check_range(name: str, value: Any, bounds: Range) -> None:
    """Raise RequestError unless `value` is a number inside of `bounds`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number, not {shown(value)}")
    if not bounds.low <= value <= bounds.high:  # false for what is not a number, too
        raise RequestError(f"{name}={shown(value)} must be from {bounds.low} to {bounds.high}")


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise RequestError for the first of `values` that stands outside of its range; None is the
    default of every number."""
    for name, bounds in ranges.items():
        if (value := values.get(name)) is not None:
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    check_range(name, each, bounds)


def check_ids(name: str, ids: Any, vocabulary: int) -> None:
    """Raise RequestError unless `ids`, a list or an int64 array, holds token ids below
    `vocabulary`."""
    if not isinstance(ids, list | array):
        raise RequestError(f"{name} must be a list of token ids, not {shown(ids)}")
    if isinstance(ids, list):
        for kind in set(map(type, ids)) - {int}:
            wrong = next(each for each in ids if type(each) is kind)
            raise RequestError(f"{name} must hold token ids only, and one is {shown(wrong)}")
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
        index, wrong = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocabulary)
        raise RequestError(
            f"{name}: token id {shown(wrong)} at index {index} is not in the vocabulary: ids are "
            f"from 0 to {vocabulary - 1}"
        )


def check_prompts(input_ids: Any, vocabulary: int) -> None:
    """Raise RequestError unless `input_ids` is one prompt of token ids, or a list of them."""
    if not isinstance(input_ids, list) or not input_ids:
        raise RequestError(f"input_ids must be a list that is not empty, not {shown(input_ids)}")
    if not isinstance(input_ids[0], list):
        return check_ids("input_ids", input_ids, vocabulary)
    for index, prompt in enumerate(input_ids):
        if not isinstance(prompt, list) or not prompt:
            raise RequestError(
                f"input_ids[{index}] must be a list that is not empty, not {shown(prompt)}"
            )
        check_ids(f"input_ids[{index}]", prompt, vocabulary)


def check_embeddings(embeddings: Any, width: int) -> None:
    """Raise RequestError unless these are the embeddings of one prompt, `[tokens, width]`, or of
    several, every number finite in float32."""
    try:
        several = isinstance(embeddings[0][0], list)
        for prompt in embeddings if several else [embeddings]:
            table = np.asarray(prompt, dtype=np.float64)
            if table.ndim != 2 or table.shape[1] != width:
                raise ValueError
            if not (np.abs(table) <= np.finfo(np.float32).max).all():  # false for NaN, too
                raise ValueError
    except (ValueError, TypeError, IndexError, KeyError, OverflowError):
        raise RequestError(
            f"input_embeds must be lists of {width} finite numbers, one list for each token"
        ) from None


def check_sampling(params: Mapping[str, Any], vocabulary: int) -> None:
    """Check the numbers and patterns of one request's sampling parameters, before they are read.

    Args:
        params: as they were sent, of the right types.

    Raises:
        RequestError: naming the parameter, its value and what it may be.
    """
    check_absent(params, UNSUPPORTED_SAMPLING)
    check_ranges(params, SAMPLING_RANGES)
    if ids := params.get("stop_token_ids"):
        check_ids("stop_token_ids", list(ids), vocabulary)
    if patterns := params.get("stop_regex"):
        _check_patterns([patterns] if isinstance(patterns, str) else patterns)
    for token, bias in (params.get("logit_bias") or {}).items():
        check_range(f"logit_bias[{token!r}]", bias, LOGIT_BIAS)
    custom = params.get("custom_params")
    if isinstance(custom, dict) and (budget := custom.get("thinking_budget")) is not None:
        check_range("thinking_budget", budget, Range(-1, LARGEST))


def _check_patterns(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise RequestError(
                f"stop_regex: {shown(pattern)} is not a regular expression: {error}"
            ) from None


def check_samples(each: Sequence[Mapping[str, Any]], prompts: int) -> None:
    """Check how many requests one call becomes.

    Args:
        each: sampling parameters, of the right ranges.
        prompts: prompts in the call.
    """
    for params in each:
        samples = params.get("n", 1)
        if samples is None:
            raise RequestError("n must be a number, not null")
        if samples > 1 and samples * prompts > MOST_REQUESTS:
            raise RequestError(
                f"n={samples} for {prompts} prompts are more than {MOST_REQUESTS} requests in one "
                "call: send several calls"
            )


def check_session(session: Mapping[str, Any] | None, *, embedded: bool) -> None:
    """Check how a request goes on in its session.

    Raises:
        RequestError: what SGLang's sessions cannot do.
    """
    if not session:
        return
    if embedded:
        raise RequestError("input_embeds cannot be joined with the tokens of a session")
    if (offset := session.get("offset")) is not None:
        check_range("session_params.offset", offset, Range(0, LARGEST))
    if session.get("replace") and session.get("rid") is None:
        raise RequestError("session_params.replace needs the rid of the request to be replaced")


def check_names(rid: Any, prompts: int | None) -> None:
    """Raise RequestError unless `rid` names the requests of `prompts` prompts; None is one prompt
    that is in no list."""
    several = isinstance(rid, list) and prompts is not None
    if not all(isinstance(name, str) for name in (rid if several else [rid])):
        raise RequestError("rid must be a string, or a list of strings for a list of prompts")
    if "" in (rid if several else [rid]):
        raise RequestError("rid must not be empty: aborting it would abort every request")


def check_absent(fields: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    """Raise RequestError for a field that a request must not have."""
    for name, why in unsupported.items():
        value = fields.get(name)
        entries = value if isinstance(value, list) else [value]
        if any(entry is not None for entry in entries):
            raise RequestError(f"{name} cannot be set by a request: {why}")
