"""Seam: accounting in OpenAI responses, as `metadata["memento"]`: JSON, one entry per choice."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from memento_sgl.observe.recorder import KEY, Recorder, write_records

logger = logging.getLogger(__name__)

DROPS_SYSTEM = "memento: drops system messages"
"""Stands in a comment of the chat templates that have no place for a system message."""


def warn_of_dropped_system(serving: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    template = getattr(serving.tokenizer_manager.tokenizer, "chat_template", None)
    if not isinstance(template, str) or DROPS_SYSTEM not in template:
        return
    if any(getattr(message, "role", None) == "system" for message in request.messages):
        logger.warning(
            "memento: the chat template drops the system message of this request, as the model "
            "was trained; serve with --chat-template memento to keep it"
        )


def add_metadata(
    response: Any, _serving: Any, _request: Any, ret: list[dict[str, Any]], *_args: Any, **_kw: Any
) -> None:
    records = [item["meta_info"].get(KEY) for item in ret]
    if any(record is not None for record in records) and hasattr(response, "metadata"):
        response.metadata = {**(response.metadata or {}), KEY: write_records(records)}


async def add_stream_metadata(
    original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    recording = copy.copy(serving)
    recorder = Recorder(serving.tokenizer_manager)
    recording.tokenizer_manager = recorder
    async for event in original(recording, *args, **kwargs):
        yield _with_record(event, recorder.records) if recorder.records else event


def _with_record(event: str, records: dict[int, dict[str, Any]]) -> str:
    """Add the record to the chunk that carries its choice's finish reason."""
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event[len("data: ") :])
    for choice in chunk.get("choices", ()):
        if choice.get("finish_reason") and choice["index"] in records:
            chunk["metadata"] = {KEY: write_records([records[choice["index"]]])}
            return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return event
