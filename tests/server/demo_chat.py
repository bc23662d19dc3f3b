"""The embedded model behind `memento serve`, asked through the real `openai` package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
from conftest import Served

from memento_sgl.demo.task import Problem
from memento_sgl.observe.recorder import read_records


def serve_demo(serve: Callable[..., Served]) -> Served:
    # The template without a system prompt: this model was trained without one too.
    return serve(
        "demo-chat",
        "demo",
        *("--chat-template", "memento_nosys"),
        *("--tool-call-parser", "qwen"),
        "--enable-cache-report",
    )


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)


def ask(client: openai.OpenAI, problem: Problem, **options: Any) -> Any:
    options = {"messages": problem.messages, "max_tokens": 2000} | options
    return client.chat.completions.create(model="demo", temperature=0, **options)


def record_of(answer: Any) -> dict[str, Any]:
    (record,) = read_records(answer.model_extra["metadata"])
    found: dict[str, Any] = record
    return found
