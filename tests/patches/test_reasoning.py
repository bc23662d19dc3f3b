"""What the reasoning parser learns from server, request and prompt."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from memento_patches.reasoning import adapt_parser, keep_tags
from sglang.srt.parser.reasoning_parser import ReasoningParser
from transformers import AddedToken

from memento_sgl.demo.tokenizer import build_tokenizer
from memento_sgl.request.settings import Settings
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import resolve_markers
from memento_sgl.serve.reasoning_parser import MementoDetector, register_parser

OPENS = "{% if enable_thinking is not false %}<think>\n{% endif %}"
PLAIN = "<|block_start|>a<|block_end|><|summary_start|>b<|summary_end|></think>c"
Split = Callable[..., tuple[str, str]]


def server_args(tokenizer: Any, **config: Any) -> SimpleNamespace:
    settled = MementoConfig(enable=True, mask_delimiters=False, **config)
    return SimpleNamespace(_memento=Settings(settled, resolve_markers(settled, tokenizer)))


def request(show: bool | None = None, **fields: Any) -> SimpleNamespace:
    options = {} if show is None else {"show_markers": show}
    return SimpleNamespace(custom_params={"memento": options}, **fields)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Split:
    def run(text: str, asked: Any, template: str = "", **config: Any) -> tuple[str, str]:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        arguments = server_args(tokenizer, **config)
        monkeypatch.setattr("sglang.srt.runtime_context.get_server_args", lambda: arguments)
        register_parser(arguments._memento.config)
        parser = ReasoningParser("memento")
        more = {"tool_call_parser_active": False, "prefix": None}  # as SGLang passes them
        adapt_parser(None, parser, request=asked, tokenizer=tokenizer, **more)
        found: tuple[str, str] = parser.parse_non_stream(text)
        return found

    return run


def test_the_prompt_may_open_the_thought(split: Split) -> None:
    assert split("a</think>c", request()) == ("", "a</think>c")
    assert split("a</think>c", request(), OPENS) == ("a", "c")
    direct = request(chat_template_kwargs={"enable_thinking": False})
    assert split("a</think>c", direct, OPENS) == ("", "a</think>c")
    opened = build_tokenizer().encode("x<|im_start|>assistant\n<think>\n")
    assert split("a</think>c", request(input_ids=opened)) == ("a", "c")
    assert split("a</think>c", request(input_ids=opened[:-2]), OPENS) == ("", "a</think>c")
    assert split("a</think>c", request(), "{{ nothing.at.all }}") == ("", "a</think>c")


def test_the_request_overrides_the_server(split: Split) -> None:
    shown = PLAIN.partition("</think>")[0]
    assert split(PLAIN, request()) == ("ab", "c")
    assert split(PLAIN, request(True)) == (shown, "c")
    assert split(PLAIN, request(), show_markers=True) == (shown, "c")
    assert split(PLAIN, request(False), show_markers=True) == ("ab", "c")


def test_the_markers_are_those_of_the_model(split: Split) -> None:
    number = str(build_tokenizer().convert_tokens_to_ids("system"))
    answer = PLAIN.replace("<|block_start|>", "system")
    assert split(answer, request(), block_start_token=number) == ("ab", "c")


def test_the_think_tags_are_those_of_the_model(split: Split) -> None:
    tags = {"think_start_token": "user", "think_end_token": "system"}
    answer = PLAIN.replace("</think>", "system\n")
    assert split(f"user{answer}", request(), **tags) == ("ab", "c")
    assert split(answer, request(), "user\n", **tags) == ("ab", "c")
    assert split("<think>a</think>c", request(), **tags) == ("", "<think>a</think>c")


def test_tags_that_are_special_tokens_are_kept() -> None:
    def skips(*special: str, parser: str = "memento", show: bool | None = None) -> bool:
        tokenizer = build_tokenizer()
        tokenizer.add_tokens([AddedToken(tag, special=True) for tag in special])
        asked = request(show, skip_special_tokens=True)
        manager = SimpleNamespace(server_args=server_args(tokenizer), tokenizer=tokenizer)
        serving = SimpleNamespace(
            reasoning_parser=parser,
            tokenizer_manager=manager,
            _reasoning_detector=MementoDetector(),
        )
        keep_tags(None, serving, asked)
        found: bool = asked.skip_special_tokens
        return found

    assert skips()
    assert skips(show=True)
    assert not skips("</think>")
    assert skips("</think>", parser="qwen3")
    assert skips("<|block_end|>")
    assert not skips("<|block_end|>", show=True)
