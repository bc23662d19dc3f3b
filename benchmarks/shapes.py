"""Model folders without weights, for `--load-format dummy`: a shape, a tokenizer, no training."""

from __future__ import annotations

import json
from pathlib import Path

from memento_sgl.demo.tokenizer import VOCABULARY, build_tokenizer

# Published configurations; "tiny" is the project's own.
SHAPES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": len(VOCABULARY),
        "torch_dtype": "float32",
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "torch_dtype": "bfloat16",
    },
}
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": VOCABULARY.index("<|im_end|>"),
}


def write_model(folder: Path, shape: str) -> Path:
    """Write configuration and tokenizer of a shape to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[shape], indent=1))
    return folder
