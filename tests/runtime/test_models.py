"""Models whose layers take rows for positions are refused; tables in the docs are the code's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from models import FAMILIES
from sglang.srt.configs.model_config import ModelConfig
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from memento_sgl.errors import ConfigError
from memento_sgl.serve.models import (
    BACKENDS,
    EXACT,
    check_architectures,
    check_backend,
    refuse_model,
)

ROOT = Path(__file__).parents[2]
Launch = Callable[..., None]
SMALL: dict[str, Any] = {"max_position_embeddings": 8192, "num_hidden_layers": 8}


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Asks about a configuration the way a launch does: SGLang reads it from a folder."""

    def ask(config: PreTrainedConfig, architecture: str, context: int | None = None) -> None:
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        refuse_model(ModelConfig(str(tmp_path), context_length=context))

    return ask


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        (Olmo3Config(**SMALL), "Olmo3ForCausalLM", "sliding_attention"),
        (Gemma3TextConfig(**SMALL), "Gemma3ForCausalLM", "sliding_attention"),
        (GptOssConfig(**SMALL), "GptOssForCausalLM", "sliding-window layers"),
        (
            Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=64, max_window_layers=4),
            "Qwen2ForCausalLM",
            "sliding_attention",
        ),
        (Qwen3NextConfig(**SMALL), "Qwen3NextForCausalLM", "recurrent or linear"),
        (MistralConfig(**SMALL, sliding_window=64), "MistralForCausalLM", "--context-length 64"),
        (Phi3Config(**SMALL, sliding_window=2047), "Phi3ForCausalLM", "--context-length 2047"),
        (LlamaConfig(**SMALL, attn_temperature_len=1024), "Grok1ForCausalLM", "temperatures"),
        (
            DeepseekV2Config(**SMALL, index_topk=64, index_head_dim=64),
            "DeepseekV32ForCausalLM",
            "an indexer",
        ),
        (
            LlamaConfig(**SMALL, sparse_attention_config={"sparse_topk_blocks": 4}),
            "MiniMaxM3SparseForCausalLM",
            "an indexer",
        ),
        (
            Qwen2Config(**SMALL, dual_chunk_attention_config={"chunk_size": 64}),
            "Qwen2ForCausalLM",
            "dual chunk",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_would_take_rows_for_positions_are_refused(
    launch: Launch, config: PreTrainedConfig, architecture: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match="memento does not support") as refused:
        launch(config, architecture)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "architecture", "context"),
    [
        (Qwen3Config(**SMALL, sliding_window=64), "Qwen3ForCausalLM", None),  # not used
        (Qwen3MoeConfig(**SMALL), "Qwen3MoeForCausalLM", None),
        (LlamaConfig(**SMALL), "LlamaForCausalLM", None),
        (Phi3Config(**SMALL, sliding_window=None), "Phi3ForCausalLM", None),
        (Phi3Config(**SMALL, sliding_window=262144), "Phi3ForCausalLM", None),
        (MistralConfig(**SMALL, sliding_window=64), "MistralForCausalLM", 64),
    ],
)
def test_full_attention_and_windows_that_hide_nothing_are_served(
    launch: Launch, config: PreTrainedConfig, architecture: str, context: int | None
) -> None:
    launch(config, architecture, context)


def test_what_is_not_in_the_tables_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for layout in EXACT:
            check_architectures(layout.architectures)
        check_backend("torch_native", "torch.bfloat16")
        assert caplog.messages == []
        check_backend("triton", "torch.bfloat16")
        check_backend("flashinfer", "torch.bfloat16")
        check_backend("aiter", "torch.bfloat16")
        check_architectures(["FalconForCausalLM"])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            "memento: attention backend triton: exact under Triton's interpreter, in float32; "
            "kernels not run on a GPU",
        ),
        ("WARNING", "memento: attention backend flashinfer has not been checked for exactness"),
        ("WARNING", "memento: attention backend aiter has not been checked for exactness"),
        (
            "WARNING",
            "memento: FalconForCausalLM has not been checked for exactness, see docs/models.md",
        ),
    ]


def test_the_interpreter_is_refused_what_it_multiplies_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """findings/triton_interpreter_bfloat16_dot.sh"""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_backend("torch_native", "torch.bfloat16")
    check_backend("triton", "torch.float32")
    with pytest.raises(ConfigError, match="--dtype float32"):
        check_backend("triton", "torch.bfloat16")


def test_each_entry_has_its_test_and_model() -> None:
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for layout in EXACT:
        for test, shape in layout.tests.values():
            kind, _ = FAMILIES[shape]
            assert AutoModelForCausalLM._model_mapping[kind].__name__ in layout.architectures
            assert f'"{shape}"' in files[test], f"{test}.py does not serve {shape}"
    for name, backend in BACKENDS.items():
        if backend.known and name != "torch_native":  # what a CPU server takes by itself
            assert f'"{name}"' in files[backend.test], f"{backend.test}.py does not use {name}"


def test_the_tables_in_the_docs_are_the_codes() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    from make_models import PAGES, with_table

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == with_table(page, text), "run python docs/make_models.py"
