"""A thought and its answer from one streamed call; blocks are evicted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memento_frontend.collect import ReasoningBuilder
from memento_frontend.events import Event
from memento_frontend.join_calls import parser
from memento_frontend.native import NativeClient, Output, Prompt
from memento_frontend.options import Options
from memento_frontend.results import Reasoning
from memento_sgl.errors import ConfigError

QUIET_INTERVAL = 64
"""Tokens between two chunks when nobody listens: each chunk holds everything so far."""


def reason_in_one_call(
    client: NativeClient,
    question: Prompt,
    options: Options | None = None,
    *,
    on_event: Callable[[Event], None] | None = None,
) -> Reasoning:
    """Ask one question.

    Args:
        on_event: gets each step of the thought as it comes; an exception in it ends the request.

    Raises:
        ConfigError: an option that one call cannot keep.
        RefusedError, EndpointError: see `NativeClient.generate`.
    """
    options = options or Options()
    check_one_call(client, options)
    prompt = client.encode_chat(question)
    (text,) = client.decode(prompt)
    follow, builder = parser(client, text), ReasoningBuilder()

    def take(events: list[Event]) -> None:
        for event in events:
            builder.add(event)
            if on_event is not None:
                on_event(event)

    left = client.room(prompt, options.max_tokens)
    sampling = {"max_new_tokens": left, **options.block.given()}
    if on_event is None:
        sampling["stream_interval"] = QUIET_INTERVAL
    shape = options.answer_shape()
    for output in client.stream(
        prompt, sampling | shape, options.request(), require_reasoning=bool(shape)
    ):
        take(follow.feed(_chunk(output)))
    take(follow.finish())
    return builder.reasoning()


def check_one_call(client: NativeClient, options: Options) -> None:
    """Raises ConfigError for what only a call per step can do."""
    if not options.block == options.memento == options.answer:
        raise ConfigError(
            "one call has one sampling: give block, memento and answer the same, or use reason()"
        )
    if options.max_answer_tokens is not None:
        raise ConfigError("max_answer_tokens needs a call of its own: use reason()")
    if options.max_blocks is not None and not options.strict:
        raise ConfigError('in one call max_blocks needs constrain="strict"; or use reason()')
    if options.answer_shape() and not client.info().get("reasoning_parser"):
        raise ConfigError(
            "json_schema and regex would hold from the first token of the thought: start the "
            "server without --reasoning-parser none, so that they begin after </think>, or use "
            "reason()"
        )


def _chunk(output: Output) -> dict[str, Any]:
    return {"text": output.text, "output_ids": list(output.ids), "meta_info": output.meta}
