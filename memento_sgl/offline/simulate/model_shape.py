"""What one KV token costs a model: bytes = tokens x layers x KV heads x head size x 2 x bytes per
element (paper A.3.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memento_sgl.errors import ConfigError

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide how much memory a KV token takes.

    Attributes:
        architectures: names of model classes, which settle `mask_delimiters="auto"`.
        element_bytes: bytes of one element of K or V.
    """

    name: str
    architectures: tuple[str, ...]
    layers: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of the KV of this many tokens; every layer is counted in full."""
        return tokens * self.layers * self.kv_heads * self.head_size * 2 * self.element_bytes


QWEN3, PHI3 = ("Qwen3ForCausalLM",), ("Phi3ForCausalLM",)
SHAPES = {
    shape.name: shape
    for shape in (
        # From the config.json files that Qwen and Microsoft publish with the checkpoints.
        ModelShape("qwen3-0.6b", QWEN3, 28, 8, 128),
        ModelShape("qwen3-1.7b", QWEN3, 28, 8, 128),
        ModelShape("qwen3-4b", QWEN3, 36, 8, 128),
        ModelShape("qwen3-8b", QWEN3, 36, 8, 128),
        ModelShape("qwen3-14b", QWEN3, 40, 8, 128),
        ModelShape("qwen3-32b", QWEN3, 64, 8, 128),
        ModelShape("phi-4-reasoning", PHI3, 40, 10, 128),
    )
}


def load_shape(source: str, dtype: str | None = None) -> ModelShape:
    """The shape of a known model, a config.json or a folder that holds one.

    Args:
        dtype: of the KV cache, a key of `ELEMENT_BYTES`; None: the model's own.

    Raises:
        ConfigError: unknown name or dtype, no such file, or a model without plain KV heads.
    """
    shape = SHAPES.get(source.lower()) or _read(Path(source))
    if dtype is None:
        return shape
    if dtype not in ELEMENT_BYTES:
        raise ConfigError(f"KV dtype {dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
    return replace(shape, element_bytes=ELEMENT_BYTES[dtype])


def _read(path: Path) -> ModelShape:
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {str(path)!r} is neither a known one ({', '.join(SHAPES)}) nor a config.json "
            f"or a folder that holds one: {error}"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file} is not a model's config.json")
    return shape_of(data, str(path))


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a model's config.json tells.

    Raises:
        ConfigError: a model without plain KV heads, or a config that does not tell.
    """
    text = config.get("text_config") or config
    if text.get("kv_lora_rank") or "linear_attention" in (text.get("layer_types") or ()):
        raise ConfigError(f"{name}: latent or linear attention has no KV heads to count")
    try:
        heads = int(text["num_attention_heads"])
        head_size = text.get("head_dim") or int(text["hidden_size"]) // heads
        dtype = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")
        return ModelShape(
            name,
            tuple(config.get("architectures") or ()),
            int(text["num_hidden_layers"]),
            int(text.get("num_key_value_heads") or heads),
            int(head_size),
            ELEMENT_BYTES[str(dtype or "bfloat16")],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: its config.json does not tell the KV size: {error!r}") from None
