"""Accounting in answers of other interfaces, with SGLang's own classes and no server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from memento_patches.other_answers import (
    add_to_message,
    record_message_stream,
    record_ollama,
    record_responses,
)
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesResponse, TextBlock
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaMessage
from sglang.srt.entrypoints.ollama.serving import OllamaServing

from memento_sgl.observe.recorder import read_records, write_records

RECORD = {"blocks": 1, "evicted_spans": [[2, 5]]}


class Manager:
    """SGLang's tokenizer manager: two parts of one answer."""

    served_model_name = "m"
    tokenizer = SimpleNamespace(apply_chat_template=lambda *_args, **_kwargs: [1])

    async def generate_request(self, obj: Any, _request: Any) -> AsyncIterator[dict[str, Any]]:
        if obj.stream:
            yield {"text": "a", "meta_info": {"finish_reason": None}}
        yield {"text": "ab", "meta_info": {"finish_reason": {"type": "stop"}, "memento": RECORD}}


@pytest.mark.parametrize("stream", [False, True])
async def test_ollama(stream: bool) -> None:
    request = OllamaChatRequest(
        model="m", messages=[OllamaMessage(role="user", content="x")], stream=stream
    )
    answer = await record_ollama(OllamaServing.handle_chat, OllamaServing(Manager()), request, None)
    if not stream:
        assert answer["memento"] == RECORD
        assert answer["message"]["content"] == "ab"
        return
    lines = [json.loads(line) async for line in answer.body_iterator]
    assert ["memento" in line for line in lines] == [False, True]
    assert lines[1]["memento"] == RECORD
    assert lines[0]["message"]["content"] == "a"


def test_messages() -> None:
    message = AnthropicMessagesResponse(content=[TextBlock(text="x")], model="m")
    plain = SimpleNamespace(metadata={"weight_version": "1"})
    assert add_to_message(message, None, plain) is None
    told = SimpleNamespace(metadata={"memento": write_records([RECORD])})
    wider = add_to_message(message, None, told)
    assert wider is not None
    assert isinstance(wider, AnthropicMessagesResponse)
    assert wider.model_dump(exclude_none=True) == message.model_dump(exclude_none=True) | {
        "memento": RECORD
    }


async def test_a_stream_of_messages() -> None:
    async def original(serving: Any, obj: Any) -> AsyncIterator[str]:
        async for _ in serving.openai_serving_chat.tokenizer_manager.generate_request(obj, None):
            yield 'event: content_block_delta\ndata: {"type": "content_block_delta"}\n\n'
        yield 'event: message_delta\ndata: {"type": "message_delta"}\n\n'
        yield 'event: message_stop\ndata: {"type": "message_stop"}\n\n'

    serving = SimpleNamespace(openai_serving_chat=SimpleNamespace(tokenizer_manager=Manager()))
    stream = record_message_stream(original, serving, SimpleNamespace(stream=True))
    events = [event async for event in stream]
    found = [json.loads(event.partition("data: ")[2]) for event in events]
    assert [event["type"] for event in found if "memento" in event] == ["message_delta"]
    assert found[2]["memento"] == RECORD
    assert events[2].startswith("event: message_delta\ndata: {")


@pytest.mark.parametrize("stream", [False, True])
async def test_responses(stream: bool) -> None:
    from sglang.srt.entrypoints.openai.protocol import ResponsesResponse

    async def events(serving: Any, obj: Any) -> AsyncIterator[str]:
        async for _ in serving.tokenizer_manager.generate_request(obj, None):
            yield 'event: x\ndata: {"type": "response.output_text.delta"}\n\n'
        end = {"type": "response.completed", "response": {"metadata": {"a": "b"}}}
        yield f"event: response.completed\ndata: {json.dumps(end)}\n\n"

    async def original(serving: Any, obj: Any) -> Any:
        if stream:
            return events(serving, obj)
        async for _ in serving.tokenizer_manager.generate_request(obj, None):
            pass
        return ResponsesResponse.model_construct(metadata={"a": "b"})

    serving = SimpleNamespace(tokenizer_manager=Manager())
    answer = await record_responses(original, serving, SimpleNamespace(stream=stream))
    if stream:
        *_, last = [event async for event in answer]
        metadata = json.loads(last.partition("data: ")[2])["response"]["metadata"]
    else:
        metadata = answer.metadata
    assert set(map(type, metadata.values())) == {str}
    assert metadata["a"] == "b"
    assert read_records(metadata) == [RECORD]
