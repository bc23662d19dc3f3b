"""The embedded model's task, tokenizer and training mask."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import MAX_BLOCKS, MAX_DIGITS, Problem, held_out, sample_problem

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from memento_sgl.demo.tokenizer import build_tokenizer
from memento_sgl.demo.train import encode, memento_mask
from memento_sgl.offline.reference import attention_mask
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markers import resolve_markers

CONFIG = MementoConfig(enable=True, mask_delimiters=False)


def test_a_problem_written_out() -> None:
    problem = Problem(("37", "9"))
    assert problem.question == "Digit sum mod 100? a37 b9"
    assert problem.output == (
        "<think>\n"
        "<|block_start|>a37 00+3=03;03+7=10;<|block_end|><|summary_start|>a=10<|summary_end|>\n"
        "<|block_start|>b9 10+9=19;<|block_end|><|summary_start|>b=19<|summary_end|>\n"
        "</think>\nThe total is 19."
    )
    assert problem.totals == [10, 19]


@given(seed=st.integers(0, 10_000))
def test_totals_are_sums_modulo_100(seed: int) -> None:
    problem = sample_problem(random.Random(seed))
    digits = [int(digit) for group in problem.groups for digit in group]
    assert problem.totals[-1] == sum(digits) % 100
    assert f"{sum(digits) % 100:02d}." in problem.answer
    assert len(problem.groups) <= MAX_BLOCKS
    assert max(map(len, problem.groups)) <= MAX_DIGITS


def test_held_out_problems_are_fixed_and_cover_all_sizes() -> None:
    problems = held_out(62)
    assert problems == held_out(62)
    assert {len(problem.groups) for problem in problems} == set(range(2, MAX_BLOCKS + 1))


def test_the_tokenizer_loses_nothing() -> None:
    tokenizer = build_tokenizer()
    _, output = encode(tokenizer, held_out(1)[0])
    assert tokenizer.decode(output) == held_out(1)[0].output + "<|im_end|>"
    assert tokenizer.encode("aé", add_special_tokens=False)[1] == tokenizer.unk_token_id
    resolve_markers(CONFIG, tokenizer)


def test_groups_that_were_not_learned_are_refused() -> None:
    tokenizer = build_tokenizer()
    assert (MODEL_DIR / "chat_template.jinja").read_text() == tokenizer.chat_template

    def prompt(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert isinstance(found, str)
        return found

    assert prompt("Digit sum mod 100? a123456 b1") == (
        "<|im_start|>user\nDigit sum mod 100? a123456 b1<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TemplateError, match=r"a1234567: .* at most 6 digits"):
        prompt("Digit sum mod 100? a1234567 b1")


def test_the_training_mask_is_the_reference_mask() -> None:
    tokenizer = build_tokenizer()
    markers = resolve_markers(CONFIG, tokenizer)
    for problem in held_out(5):
        prompt, output = encode(tokenizer, problem)
        tokens = prompt + output
        machine = replay(tokens, len(prompt), markers, CONFIG)
        assert len(machine.evictions) == len(problem.groups)
        expected = attention_mask(machine.evictions, len(tokens))
        assert torch.equal(memento_mask(torch.tensor([tokens]), tokenizer)[0, 0], expected)
