"""Rollout records without a server: built, checked, written, and laid out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memento_sgl.errors import DataError, RequestError
from memento_sgl.offline.rollout.record import RolloutRecord, read_rollouts, write_rollouts
from memento_sgl.rule.accounting import account
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import Structure
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4)
#         0   1    2  3  4  5  6  7  8  9 10 11 12 13 14 15 16
PROMPT = [20, 21]
OUTPUT = [1, 30, 31, 2, 3, 40, 4, 9, 1, 32, 2, 3, 41, 4, 9]
FREE: dict[str, Any] = {
    "enable": True,
    "mask_delimiters": False,
    "require_assistant_section": False,
}


def answer(config: MementoConfig, **meta: Any) -> dict[str, Any]:
    machine = replay(PROMPT + OUTPUT, len(PROMPT), MARKERS, config)
    record = account(machine, len(PROMPT), len(PROMPT + OUTPUT)).as_dict()
    logprobs = [[-0.5 * i, token, None] for i, token in enumerate(OUTPUT)]
    full = {
        "prompt_tokens": len(PROMPT),
        "finish_reason": {"type": "length"},
        "weight_version": "7",
        "output_token_logprobs": logprobs,
        "memento": record,
    }
    return {"output_ids": OUTPUT, "meta_info": full | meta}


def made(**options: Any) -> RolloutRecord:
    config = MementoConfig.parse(FREE | options)
    return RolloutRecord.from_generate(answer(config), PROMPT, MARKERS, config=config)


def test_a_record_says_which_weights_sampled_which_tokens() -> None:
    assert made().weight_versions == []
    spans = [
        {"version": "6", "start": 0, "end": 2},
        {"version": "7", "start": 2, "end": len(OUTPUT)},
    ]
    config = MementoConfig.parse(FREE)
    told = answer(config, weight_versions=spans)
    record = RolloutRecord.from_generate(told, PROMPT, MARKERS, config=config)
    assert record.weight_versions == [("6", 0, 2), ("7", 2, len(OUTPUT))]
    assert RolloutRecord.parse(record.model_dump_json()) == record


def test_a_record_says_what_happened() -> None:
    record = made()
    assert record.block_spans == [(3, 5), (11, 12)]
    assert record.memento_spans == [(7, 8), (14, 15)]
    assert record.evictions == [(8, 3, 5, 8), (15, 11, 12, 15)]
    assert record.logprobs == [-0.5 * i for i in range(len(OUTPUT))]
    assert (record.finish_reason, record.weight_version) == ("length", "7")
    assert made(keep_last_n_blocks=1).evictions == [(15, 3, 5, 15)]
    assert made(keep_last_n_blocks=-1).evictions == []
    assert made(mask_delimiters=True).evictions[0] == (8, 2, 6, 8)


def test_restart_mode_is_carried_to_the_layout() -> None:
    pytest.importorskip("torch")
    from memento_sgl.offline.reference import lay_out

    record = made(restart_mode=True)
    assert record.evictions[0] == (8, 2, 6, 6)
    config = MementoConfig.parse(FREE | {"restart_mode": True})
    machine = replay(PROMPT + OUTPUT, len(PROMPT), MARKERS, config)
    expected = lay_out(machine.evictions, len(PROMPT + OUTPUT))
    found = RolloutRecord.parse(record.model_dump_json()).layout()
    assert len(found.logical) > len(PROMPT + OUTPUT)
    assert found.visible.equal(expected.visible)
    assert found.logical.equal(expected.logical)
    assert found.first.equal(expected.first)


def test_files_keep_everything(tmp_path: Path) -> None:
    records = [made(), made(restart_mode=True), made(keep_last_n_blocks=-1)]
    assert write_rollouts(tmp_path / "r.jsonl", records) == 3
    assert list(read_rollouts(str(tmp_path / "r.jsonl"))) == records
    text = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(text.replace('"output_ids":[1,', '"output_ids":[', 1))
    with pytest.raises(DataError, match=r"r\.jsonl:1: not a rollout record: 15 logprobs for 14"):
        list(read_rollouts(tmp_path / "r.jsonl"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"logprobs": [0.0]}, "1 logprobs for 15 output_ids"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"memento_spans": []}, "2 block_spans and 0 memento_spans"),
        ({"block_spans": [[3, 5], [4, 12]]}, r"block_spans\[1\]=\[4, 12\] overlaps"),
        ({"memento_spans": [[7, 8], [14, 17]]}, r"memento_spans\[1\]=\[14, 17\] .*leaves"),
        ({"block_spans": [[3, 4], [11, 12]]}, "do not all stand between the same two marker"),
        ({"evictions": [[8, 3, 4, 8]]}, "is not the span of a block"),
        ({"evictions": [[17, 3, 5, 17]]}, "end <= resume <= point < 17"),
        ({"evictions": [[8, 3, 5, 4]]}, "end <= resume <= point < 17"),
        ({"evictions": [[15, 11, 12, 15], [8, 3, 5, 8]]}, "points must rise"),
        ({"format": "memento-rollout-2"}, "format: Input should be 'memento-rollout-1'"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"output_ids": [1.5]}, "output_ids.0: Input should be a valid integer"),
    ],
)
def test_a_record_that_contradicts_itself(changes: dict[str, Any], reason: str) -> None:
    row = json.loads(made().model_dump_json())
    assert RolloutRecord.parse(row) == made()
    with pytest.raises(DataError, match=reason):
        RolloutRecord.parse(row | changes)


def test_an_answer_that_is_not_to_this_prompt_or_options() -> None:
    config = MementoConfig.parse(FREE)
    other = MementoConfig.parse(FREE | {"keep_last_n_blocks": 1})

    def build(found: dict[str, Any], **more: Any) -> RolloutRecord:
        return RolloutRecord.from_generate(found, PROMPT, MARKERS, **({"config": config} | more))

    with pytest.raises(DataError, match="server's evicted_spans"):
        build(answer(other))
    assert build(answer(other), options={"keep_last_n_blocks": 1}).evictions
    with pytest.raises(DataError, match="prompt of 3 tokens, not 2"):
        build(answer(config, prompt_tokens=3))
    with pytest.raises(DataError, match="other tokens than output_ids"):
        build(answer(config, output_token_logprobs=[[0.0, 5, None]]))
    with pytest.raises(DataError, match="no meta_info"):
        build(answer(config, memento=None))
    off = build(answer(config, memento=None), options={"enable": False})
    assert off.evictions == []
    assert off.block_spans
    with pytest.raises(DataError, match="no meta_info and no output_ids: ask /generate"):
        build({"choices": []})
    with pytest.raises(RequestError, match="unknown option"):
        build(answer(config), options={"keep": 1})
    assert build(answer(config), temperature=0.0).temperature == 1.0
    assert build(answer(config, output_token_logprobs=None)).logprobs is None


def test_what_caps_and_strict_emission_permitted() -> None:
    config = MementoConfig.parse(FREE | {"max_block_tokens": 2})
    record = RolloutRecord.from_generate(answer(config), PROMPT, MARKERS, config=config)
    assert record.forced == [5]
    assert record.special_ids == [1, 2, 3, 4]
    assert record.permitted == [(2, True, [1, 2, 3, 4]), (5, False, [2]), (6, True, [1, 2, 3, 4])]
    row = json.loads(record.model_dump_json())
    for wrong, reason in (
        ([[5, False, [2]]], r"permitted\[0\] starts at 5"),
        ([[2, True, [1, 2, 3, 4]], [2, False, [2]]], r"permitted\[0\] starts at 2"),
        ([[2, True, [2, 3, 4]]], "token 1 at 2 was not permitted"),
        ([[2, True, [1, 2, 3, 4]], [4, False, [2]]], "token 31 at 4 was not permitted"),
    ):
        with pytest.raises(DataError, match=reason):
            RolloutRecord.parse(row | {"permitted": wrong})
    markers = MARKERS._replace(think_start=5, think_end=6)
    output = [5, 1, 30, 2, 3, 40, 4, 6, 9, 7]
    strict = MementoConfig.parse(FREE | {"constrain": "strict", "max_blocks": 1})
    machine = replay(PROMPT + output, 2, markers, strict)
    meta = {"memento": account(machine, 2, 12).as_dict(), "finish_reason": None}
    found = RolloutRecord.from_generate(
        {"output_ids": output, "meta_info": meta},
        PROMPT,
        markers,
        config=strict,
        structure=Structure((7,), ()),
    )
    assert found.permitted[0] == (2, False, [5])
    assert found.permitted[-1] == (10, True, [7])
    assert {2, 6, 9} <= set(found.forced)  # <think>, the memento's start, </think>
