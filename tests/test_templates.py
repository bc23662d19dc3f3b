"""Chat templates: rendered text, written out in full."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from memento_sgl.chat_template import chat_environment
from memento_sgl.templates import template, template_path

THOUGHT = "<|block_start|>2+2<|block_end|><|summary_start|>4<|summary_end|>"
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n4"},
    {"role": "user", "content": "Sure?"},
]
TURNS = (
    "<|im_start|>user\n2+2?<|im_end|>\n"
    f"<|im_start|>assistant\n<think>\n{THOUGHT}\n</think>\n4<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n"
)
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
TOOL_TEXT = (
    "You can call these functions. Each line is one signature in JSON.\n<tools>\n"
    '{"type": "function", "function": {"name": "add"}}\n</tools>\n'
    "To call one, answer with its name and arguments as JSON between tags:\n"
    '<tool_call>\n{"name": "function", "arguments": {"key": "value"}}\n</tool_call>'
)


def render(name: str, messages: list[dict[str, Any]], **context: Any) -> str:
    environment = chat_environment()
    context = {"add_generation_prompt": True} | context
    return environment.from_string(template(name)).render(messages=messages, **context)


def test_memento_keeps_the_system_prompt() -> None:
    expected = f"<|im_start|>system\nBe brief.<|im_end|>\n{TURNS}<|im_start|>assistant\n"
    assert render("memento", CHAT) == expected
    assert render("memento", CHAT[1:], add_generation_prompt=False) == TURNS


def test_memento_nosys_drops_it() -> None:
    assert render("memento_nosys", CHAT) == f"{TURNS}<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["memento", "memento_nosys"])
def test_separate_reasoning_is_put_back(name: str) -> None:
    answer = {"role": "assistant", "reasoning_content": f"\n{THOUGHT}\n", "content": "4"}
    assert render(name, [CHAT[1], answer, CHAT[3]], add_generation_prompt=False) == TURNS


@pytest.mark.parametrize("name", ["memento", "memento_nosys"])
def test_tools(name: str) -> None:
    messages = [CHAT[1], CALL, {"role": "tool", "content": "4"}]
    assert render(name, messages, tools=TOOLS) == (
        f"<|im_start|>system\n{TOOL_TEXT}<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_text_and_several_calls_stand_on_lines_of_their_own() -> None:
    call = CALL["tool_calls"][0]
    message = {"role": "assistant", "content": "Adding.", "tool_calls": [call, call]}
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert render("memento", [CHAT[1], message], add_generation_prompt=False).endswith(
        f"<|im_start|>assistant\nAdding.\n{one}\n{one}<|im_end|>\n"
    )


def test_misplaced_and_unknown_roles_are_errors() -> None:
    with pytest.raises(TemplateError, match="must come first"):
        render("memento", [CHAT[1], CHAT[0]])
    with pytest.raises(TemplateError, match="unknown role: robot"):
        render("memento_nosys", [{"role": "robot", "content": ""}])


def test_only_the_dropping_template_is_marked() -> None:
    from memento_patches.openai_serving import DROPS_SYSTEM

    assert DROPS_SYSTEM in template("memento_nosys")
    assert DROPS_SYSTEM not in template("memento")


def test_an_unknown_template_names_those_that_exist() -> None:
    with pytest.raises(FileNotFoundError, match="memento_nosys"):
        template_path("mementos")
