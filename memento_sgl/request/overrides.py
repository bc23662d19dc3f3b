"""The options that a request brings along: read, and checked together with its prompt. Plain
Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memento_sgl.errors import RequestError
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import RequestOptions
from memento_sgl.rule.machine import Phase, State

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
"""Sampling parameters that constrain the output."""


def check_options(
    custom_params: object,
    prompt: Sequence[int] | None,
    settings: Settings,
    *,
    input_logprobs: bool = False,
    grammar: bool = False,
) -> None:
    """Validate a request on its way in.

    Args:
        custom_params: the request's `custom_params`.
        prompt: token ids of the prompt; None: not known yet, since the scheduler joins it with
            what its session holds, and checks it then.
        settings: what the server was started with.
        input_logprobs: the request asks for log-probabilities of prompt tokens.
        grammar: a grammar constrains the output from its first token on.

    Raises:
        RequestError: with what to change; the server answers HTTP 400.
    """
    options = options_of(custom_params)
    merged = settings.config.for_request(options)
    if input_logprobs and merged.evicts:
        raise RequestError(
            "memento: log-probabilities of prompt tokens are not available while blocks are "
            'evicted: leave logprob_start_len at -1, or send {"memento": {"enable": false}} in '
            "custom_params"
        )
    if prompt is None:
        return
    if options.assistant_start is not None and options.assistant_start > len(prompt):
        raise RequestError(
            f"memento: assistant_start={options.assistant_start} lies behind the prompt "
            f"({len(prompt)} tokens)"
        )
    if merged.emission == "off" or not (grammar or merged.emission == "strict"):
        return
    state = RequestState(prompt, settings.config, settings.markers, options)
    if merged.emission == "strict":
        _check_strict(state)
    if grammar and state.machine.phase is not Phase.ANSWER:
        raise RequestError(
            f"memento: a grammar from the first token on contradicts constrain={merged.emission}, "
            "which forces markers: serve with a reasoning parser and use chat completions, where "
            "the grammar begins after the thought, or send constrain=off"
        )


def _check_strict(state: RequestState) -> None:
    """Refuse a request whose structure cannot be enforced."""
    for name in ("think_start", "think_end"):
        if getattr(state.machine.markers, name) is None:
            text = getattr(state.config, f"{name}_token")
            raise RequestError(
                f"memento: constrain=strict needs {text!r} to be one token of the model's tokenizer"
            )
    if state.machine.state_before(state.length) in (State.NO_SECTION, State.ROLE):
        raise RequestError(
            "memento: constrain=strict needs a prompt that ends inside an assistant turn: add the "
            "generation prompt, or say where the turn starts with assistant_start"
        )


def has_grammar(params: Any, *, require_reasoning: bool) -> bool:
    """Whether a grammar constrains the output from its first token on.

    Args:
        params: SGLang's sampling parameters.
        require_reasoning: it begins behind the thought.
    """
    return not require_reasoning and any(getattr(params, kind) for kind in GRAMMARS)


def options_of(custom_params: object) -> RequestOptions:
    """The overrides inside a request's `custom_params`."""
    if isinstance(custom_params, dict):
        return RequestOptions.parse(custom_params.get("memento"))
    return RequestOptions()
