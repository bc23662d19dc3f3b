"""One question with the openai package: the answer, its mementos, and what was evicted."""

import json
import os

import openai

from memento_sgl.address import DEFAULT_URL, api_root

client = openai.OpenAI(
    base_url=api_root(os.environ.get("MEMENTO_BASE_URL", DEFAULT_URL)), api_key="none"
)
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Digit sum mod 100? a372 b91 c55"}],
    temperature=0,
)
message = answer.choices[0].message
(record,) = json.loads(answer.metadata["memento"])
print(message.reasoning_content)
print(message.content)
print(f"peak KV {record['peak_kv_tokens']} instead of {record['peak_kv_tokens_without']} tokens")
