"""Tiny random models whose weights are rigged so that greedy output is full of markers.

Which letter comes next depends on everything visible (random attention and MLP layers). A few
residual dimensions are reserved: embeddings set them, no layer writes them, and only the marker
rows of the output head read them. So after certain letters a block opens or closes, a memento
begins right after each `<|block_end|>`, and output is a pseudo-random mix of well-formed and
malformed structure, which is what the engine has to survive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|block_start|>",
    "<|block_end|>",
    "<|summary_start|>",
    "<|summary_end|>",
    "<think>",
    "</think>",
    "assistant",
    "user",
    "system",
]
LETTERS = [chr(c) for c in range(33, 127)] + [" ", "\n"]
VOCABULARY = SPECIALS + LETTERS
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {}),
    "steady": (Qwen3Config, {}),
    # For Triton's interpreter, whose time is the number of programs.
    "tiny": (
        Qwen3Config,
        {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    # Llama 3.1's own factors; positions up to 8192 pass through all of its frequency bands.
    "llama3": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "phi3": (Phi3Config, {}),
}
# Marker: how many letters it follows, or the marker that it follows.
FOLLOWS: dict[str, int | str] = {
    "<|block_start|>": 5,
    "<|block_end|>": 9,
    "<|summary_end|>": 10,
    "<|summary_start|>": "<|block_end|>",
}
# One block after the other, well formed: caps end mementos and most blocks.
STEADY = FOLLOWS | {"<|block_start|>": "<|summary_end|>", "<|block_end|>": 1, "<|summary_end|>": 0}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(SPECIALS, special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(folder: Path, family: str = "qwen3", seed: int = 0, head_dim: int = 16) -> Path:
    """Write a rigged random model and its tokenizer to `folder`."""
    torch.manual_seed(seed)
    kind, shape = FAMILIES[family]
    common: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    config = kind(**common | shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # experts are stacked: [expert, output, input]
                parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5)
            elif "norm" not in name:
                parameter.normal_(0.0, 0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter[..., : len(FOLLOWS), :] = 0.0
        model.get_input_embeddings().weight.normal_(0.0, 1.0)
        model.get_output_embeddings().weight.normal_(0.0, 1.0)
        _rig(model, STEADY if family == "steady" else FOLLOWS)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def _rig(model: torch.nn.Module, follows: dict[str, int | str]) -> None:
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    head[: len(SPECIALS)] = 0.0
    embeddings[:, : len(FOLLOWS)] = 0.0
    head[:, : len(FOLLOWS)] = 0.0
    letters = (torch.randperm(len(LETTERS) - 2) + len(SPECIALS)).tolist()
    for dimension, (marker, before) in enumerate(follows.items()):
        found = [ids[before]] if isinstance(before, str) else [letters.pop() for _ in range(before)]
        embeddings[found, dimension] = 6.0
        head[ids[marker], dimension] = 100.0
