"""The oracle of weight updates against token-by-token decoding with two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markers import MarkerIds

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MARKERS = MarkerIds(3, 4, 5, 6)
#         0   1  2   3   4   5  6  7   8   9  10  11  12
TOKENS = [20, 3, 30, 31, 32, 4, 5, 40, 41, 6, 50, 51, 52]
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)


@pytest.fixture(scope="module")
def models(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    from models import build_model

    other = build_model(tmp_path_factory.mktemp("other") / "model", seed=1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return tuple(load(f, dtype=torch.float32).eval() for f in (checkpoint("qwen3"), other))


@pytest.mark.parametrize("options", [{}, {"restart_mode": True}, {"keep_last_n_blocks": -1}])
def test_one_model_in_two_phases_is_one_model(
    models: tuple[Any, Any], options: dict[str, Any]
) -> None:
    from memento_sgl.offline.reference import masked_logits
    from memento_sgl.offline.reference_updates import Phase, kept_logits, recomputed_logits

    config = MementoConfig.model_validate(CONFIG.model_dump() | options)
    evictions = replay(TOKENS, 1, MARKERS, config).evictions
    assert len(evictions) == (0 if options.get("keep_last_n_blocks") else 1)
    whole = masked_logits(models[0], TOKENS, evictions)
    for start in (1, 5, 9, 10, 12):
        phases = [Phase(models[0], 0), Phase(models[0], start)]
        for logits_of in (kept_logits, recomputed_logits):
            assert (logits_of(phases, TOKENS, evictions) - whole).abs().max() < 1e-3


@pytest.mark.parametrize("start", [1, 4, 9, 12])
def test_kept_kv_is_what_token_by_token_decoding_leaves(
    models: tuple[Any, Any], start: int
) -> None:
    """A mask is a cache without the evicted slots: delete them and decode on with other weights."""
    from memento_sgl.offline.reference_updates import Phase, kept_logits, recomputed_logits

    evictions = replay(TOKENS, 1, MARKERS, CONFIG).evictions
    (eviction,) = evictions
    cache, rows = transformers.DynamicCache(), []
    for index, token in enumerate(TOKENS):
        if index == eviction.point:
            for layer in cache.layers:
                for name in ("keys", "values"):
                    held = getattr(layer, name)
                    left = torch.cat(
                        [held[:, :, : eviction.start], held[:, :, eviction.end :]], dim=2
                    )
                    setattr(layer, name, left)
        with torch.no_grad():
            out = models[index >= start](
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[index]]),
                attention_mask=torch.zeros(1, 1, 1, cache.get_seq_length() + 1),
                past_key_values=cache,
                use_cache=True,
            )
        rows.append(out.logits[0, 0])
    phases = [Phase(models[0], 0), Phase(models[1], start)]
    stepwise = torch.stack(rows)
    assert (kept_logits(phases, TOKENS, evictions) - stepwise).abs().max() < 1e-3
    again = recomputed_logits(phases, TOKENS, evictions)
    assert (again[:start] - stepwise[:start]).abs().max() < 1e-3
    assert (again[start:] - stepwise[start:]).abs().max() > 1
