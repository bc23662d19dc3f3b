"""Seam: accounting in the Responses interface, and in those of other makers.

`/v1/responses`: `metadata["memento"]`, as in chat completions. `/v1/messages` and Ollama's end
points: a field `memento` of the answer, in a stream of its last part.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pydantic import BaseModel

from memento_sgl.observe.recorder import KEY, Recorder, read_records, write_records


async def record_responses(
    original: Callable[..., Awaitable[Any]], serving: Any, *args: Any, **kwargs: Any
) -> Any:
    answer: Any
    recording = copy.copy(serving)
    recording.tokenizer_manager = recorder = Recorder(serving.tokenizer_manager)
    answer = await original(recording, *args, **kwargs)
    if isinstance(answer, AsyncIterator):
        return _events(answer, recorder, _end_of_response)
    if isinstance(answer, BaseModel) and recorder.records:
        response: Any = answer
        response.metadata = _metadata(response.metadata, recorder)
    return answer


def add_to_message(message: BaseModel, _serving: Any, response: Any) -> BaseModel | None:
    records = read_records(response.metadata)
    return None if records is None else _with_fields(message, memento=records[0])


def record_message_stream(
    original: Callable[..., AsyncIterator[str]], serving: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    recording = copy.copy(serving)
    recording.openai_serving_chat = chat = copy.copy(serving.openai_serving_chat)
    chat.tokenizer_manager = recorder = Recorder(chat.tokenizer_manager)
    return _events(original(recording, *args, **kwargs), recorder, _end_of_message)


async def record_ollama(
    original: Callable[..., Awaitable[Any]], serving: Any, *args: Any, **kwargs: Any
) -> Any:
    recording = copy.copy(serving)
    recording.tokenizer_manager = recorder = Recorder(serving.tokenizer_manager)
    answer = await original(recording, *args, **kwargs)
    if hasattr(answer, "body_iterator"):
        answer.body_iterator = _lines(answer.body_iterator, recorder)
    elif recorder.records:
        return answer.model_dump() | {KEY: recorder.records[0]}
    return answer


def _metadata(given: dict[str, Any] | None, recorder: Recorder) -> dict[str, Any]:
    return {**(given or {}), KEY: write_records([recorder.records[0]])}


def _with_fields(answer: BaseModel, **fields: Any) -> BaseModel:
    """An equal answer of a type that has these fields, too."""
    kind = type(answer)
    wider: Any = type(kind.__name__, (kind,), {"model_config": {"extra": "allow"}})
    made: BaseModel = wider.model_construct(**dict(answer) | fields)
    return made


def _end_of_response(event: dict[str, Any], recorder: Recorder) -> bool:
    if event["type"] not in ("response.completed", "response.incomplete", "response.failed"):
        return False
    event["response"]["metadata"] = _metadata(event["response"].get("metadata"), recorder)
    return True


def _end_of_message(event: dict[str, Any], recorder: Recorder) -> bool:
    if event["type"] != "message_delta":
        return False
    event[KEY] = recorder.records[0]
    return True


async def _events(
    stream: AsyncIterator[str],
    recorder: Recorder,
    amend: Callable[[dict[str, Any], Recorder], bool],
) -> AsyncIterator[str]:
    async for text in stream:
        head, mark, data = text.partition("data: {")
        if recorder.records and mark:
            event = json.loads("{" + data)
            if amend(event, recorder):
                text = f"{head}data: {json.dumps(event, ensure_ascii=False)}\n\n"
        yield text


async def _lines(stream: AsyncIterator[bytes], recorder: Recorder) -> AsyncIterator[bytes]:
    async for line in stream:
        part = json.loads(line) if recorder.records else {}
        yield (
            json.dumps(part | {KEY: recorder.records[0]}).encode() + b"\n"
            if part.get("done")
            else line
        )
