"""Blocks, mementos and evictions as they happen."""

import os

import openai
from memento_frontend import events
from memento_frontend.stream import OpenAIParser, read

from memento_sgl.address import DEFAULT_URL, api_root

client = openai.OpenAI(
    base_url=api_root(os.environ.get("MEMENTO_BASE_URL", DEFAULT_URL)), api_key="none"
)
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Digit sum mod 100? a372 b91 c55"}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"separate_reasoning": False},
)
for event in read(stream, OpenAIParser()):
    match event:
        case events.BlockText() | events.MementoText() | events.AnswerText():
            print(event.text, end="", flush=True)
        case events.BlockClosed():
            print("  ->  ", end="")
        case events.MementoClosed():
            print()
        case events.BlockEvicted():
            print(f"\n(block {event.number + 1}: {event.tokens} KV tokens left)", end="")
print()
