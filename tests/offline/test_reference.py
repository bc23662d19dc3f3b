"""The reference mask and the accounting against the definition, entry by entry."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from memento_sgl.rule.accounting import account, kv_curve
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine, Eviction, replay
from memento_sgl.rule.markers import MarkerIds

torch = pytest.importorskip("torch")
MARKERS = MarkerIds(1, 2, 3, 4)


def sequences(count: int, **options: object) -> list[tuple[list[int], int, BlockMachine]]:
    base = {"enable": True, "mask_delimiters": False, "require_assistant_section": False}
    config = MementoConfig.model_validate(base | options)
    made = []
    for seed in range(count):
        rng = random.Random(seed)
        tokens = rng.choices([1, 2, 3, 4, 9, 9, 9], k=rng.randint(2, 60))
        prompt_len = rng.randint(1, len(tokens))
        made.append((tokens, prompt_len, replay(tokens, prompt_len, MARKERS, config)))
    return made


def sees(evictions: Sequence[Eviction], query: int, key: int) -> bool:
    gone = any(e.start <= key < e.end and e.point <= query for e in evictions)
    return key <= query and not gone


@pytest.mark.parametrize("options", [{}, {"mask_delimiters": True}, {"keep_last_n_blocks": 1}])
def test_mask_and_accounting_follow_the_definition(options: dict[str, object]) -> None:
    from memento_sgl.offline.reference import attention_mask, lay_out

    evicted = 0
    for tokens, prompt_len, machine in sequences(150, **options):
        n = len(tokens)
        mask = attention_mask(machine.evictions, n)
        assert mask.tolist() == [
            [sees(machine.evictions, q, k) for k in range(n)] for q in range(n)
        ]
        assert lay_out(machine.evictions, n).visible.equal(mask)
        held = mask.sum(1).tolist()
        assert kv_curve(machine.evictions, n) == held
        result = account(machine, prompt_len, n)
        assert result.peak_kv_tokens == max(held[:-1])
        assert result.final_kv_tokens == held[-2]
        assert result.kv_auc == sum(held[prompt_len - 1 : -1])
        assert result.kv_auc_without == sum(range(prompt_len, n))
        evicted += result.evicted_tokens
    assert evicted > 0


#         0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
SEQUENCE = [9, 1, 9, 9, 9, 2, 3, 9, 9, 4, 9, 1, 9, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"evicted_spans": [(2, 5)], "evicted_tokens": 3, "recomputed_tokens": 0}),
        (
            {"restart_mode": True},
            {"evicted_spans": [(1, 6)], "evicted_tokens": 5, "recomputed_tokens": 3},
        ),
    ],
)
def test_one_record_in_full(options: dict[str, object], expected: dict[str, object]) -> None:
    """The second memento ends with the last token, which is never read: it freed nothing."""
    config = MementoConfig.model_validate(
        {"enable": True, "mask_delimiters": False, "require_assistant_section": False} | options
    )
    record = account(replay(SEQUENCE, 2, MARKERS, config), 2, len(SEQUENCE)).as_dict()
    gone = record["evicted_tokens"]
    assert record == expected | {
        "blocks": 2,
        "block_tokens": [3, 1],
        "summary_tokens": [2, 0],
        "eviction_points": [9],
        "peak_kv_tokens": 15 - gone,
        "final_kv_tokens": 15 - gone,
        "kv_auc": sum(range(2, 16)) - gone * len(range(9, 15)),
        "peak_kv_tokens_without": 15,
        "final_kv_tokens_without": 15,
        "kv_auc_without": sum(range(2, 16)),
    }


def test_restart_layout_sees_the_second_copy_only_after_the_point() -> None:
    from memento_sgl.offline.reference import lay_out

    #          0  1  2  3  4  5  6  7
    tokens = [9, 1, 9, 2, 3, 9, 4, 9]
    config = MementoConfig(
        enable=True, mask_delimiters=False, require_assistant_section=False, restart_mode=True
    )
    (eviction,) = replay(tokens, 0, MARKERS, config).evictions
    assert eviction == Eviction(point=6, start=1, end=4, resume=4)
    layout = lay_out([eviction], len(tokens))
    assert layout.logical.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert layout.first.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    seen = [row.nonzero().flatten().tolist() for row in layout.visible]
    assert seen[5] == [0, 1, 2, 3, 4, 5]
    assert seen[6:] == [[0, 6], [0, 6, 7], [0, 6, 7, 8], [0, 6, 7, 8, 9]]


def test_one_pass_check_agrees_with_step_by_step_generation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from models import build_model

    from memento_sgl.offline.reference import check_greedy, generate
    from memento_sgl.rule.markers import resolve_markers

    torch.set_num_threads(1)
    folder = build_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for options in ({}, {"restart_mode": True}, {"max_block_tokens": 3}):
        config = MementoConfig.model_validate({"enable": True, "mask_delimiters": False} | options)
        markers = resolve_markers(config, tokenizer)
        prompt = random.Random(4).choices(range(12, 100), k=12)
        output = generate(model, prompt, config, markers, max_new_tokens=90)
        assert check_greedy(model, prompt, output, config, markers) == []
        changed = [*output[:50], (output[50] + 1) % 100, *output[51:]]
        assert check_greedy(model, prompt, changed, config, markers)[0].position == 62
