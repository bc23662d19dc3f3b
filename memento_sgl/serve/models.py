"""Which models and attention backends are exact, and how that is known.

The tables are what a launch says or refuses; docs/models.md and docs/scale.md show them
(`python docs/make_models.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from memento_sgl.environment import triton_interpreted
from memento_sgl.errors import ConfigError

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """A kind of attention that tests compare with Hugging Face's own, under our mask.

    Attributes:
        families: for readers.
        architectures: names of model classes.
        attention: what is special about it.
        tests: by attention backend, the test file that says so and the tiny random model of
            `tests/models.py` that it serves.
    """

    families: str
    architectures: tuple[str, ...]
    attention: str
    tests: Mapping[str, tuple[str, str]]


class Backend(NamedTuple):
    """An attention backend of SGLang.

    Attributes:
        pages: page sizes of the tests.
        known: what the tests have shown; "" for nothing, which a launch warns of.
        test: the file that says so.
    """

    pages: str
    known: str
    test: str


NATIVE, TRITON = "torch_native", "triton"
_LAYOUTS = "test_server_layouts"

EXACT = (
    Layout(
        "Qwen3",
        ("Qwen3ForCausalLM",),
        "grouped heads, normalised queries and keys",
        {NATIVE: ("test_server_overlap", "qwen3"), TRITON: ("test_server_triton", "tiny")},
    ),
    Layout(
        "Qwen2, Qwen2.5",
        ("Qwen2ForCausalLM",),
        "grouped heads with biases",
        {NATIVE: ("test_server_modes", "qwen2")},
    ),
    Layout(
        "Llama 1, 2",
        ("LlamaForCausalLM",),
        "grouped heads",
        {NATIVE: ("test_server_modes", "llama")},
    ),
    Layout(
        "Llama 3",
        ("LlamaForCausalLM",),
        "grouped heads, scaled rotary positions",
        {NATIVE: (_LAYOUTS, "llama3")},
    ),
    Layout(
        "Phi-3, Phi-4",
        ("Phi3ForCausalLM",),
        "fused projections, delimiters go with the block",
        {NATIVE: (_LAYOUTS, "phi3")},
    ),
    Layout(
        "Qwen3-MoE",
        ("Qwen3MoeForCausalLM",),
        "as Qwen3, mixture of experts",
        {NATIVE: (_LAYOUTS, "moe")},
    ),
)

BACKENDS: Mapping[str, Backend] = {
    NATIVE: Backend("1, 4, 16", "exact, in every run of the tests", "test_server_overlap"),
    TRITON: Backend(
        "1, 16",
        "exact under Triton's interpreter, in float32; kernels not run on a GPU",
        "test_server_triton",
    ),
    "flashinfer": Backend("", "", ""),
    "fa3": Backend("", "", ""),
}

# Attribute of SGLang's ModelConfig: what a model that has it would need.
_UNSUPPORTED = (
    ("is_hybrid_swa", "sliding-window layers"),
    ("is_multimodal", "multimodal positions"),
    ("is_encoder_decoder", "an encoder"),
)

# Field of the model's own config.json: what it does with the rows of evicted tokens.
_BY_ROWS = (
    ("dual_chunk_attention_config", "dual chunk attention, whose chunks count rows"),
    ("attention_chunk_size", "chunked attention, whose chunks count rows"),
    ("attn_temperature_len", "attention temperatures by length, which kernels take from rows"),
    ("index_topk", "sparse attention with an indexer"),
    ("sparse_attention_config", "sparse attention with an indexer"),
)


def refuse_model(model: Any) -> None:
    """Raise ConfigError for a model whose layers block eviction does not support.

    Args:
        model: SGLang's ModelConfig.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config

    text = model.hf_text_config
    for attribute, what in _UNSUPPORTED:
        if getattr(model, attribute, False):
            raise ConfigError(f"memento does not support models with {what} yet")
    if mambaish_config(model) is not None:
        raise ConfigError("memento does not support models with recurrent or linear layers yet")
    kinds = getattr(text, "layer_types", None) or ()
    if others := set(kinds) - {"full_attention"}:
        raise ConfigError(
            f"memento does not support layers of type {', '.join(sorted(others))} yet"
        )
    for field, what in _BY_ROWS:
        if _is_set(getattr(text, field, None)):
            raise ConfigError(f"memento does not support models with {what} yet ({field})")
    if not kinds:
        _refuse_window(text, model.context_len)


def _is_set(value: Any) -> bool:
    return bool(value) and value != -1


def _refuse_window(text: Any, context: int) -> None:
    """A window that the configuration states for all layers, whether SGLang's model heeds it or
    not: as long as no request is longer, it hides nothing."""
    window = getattr(text, "sliding_window", None)
    if window is None or not getattr(text, "use_sliding_window", True):
        return
    if _is_set(window) and window < context:
        raise ConfigError(
            f"memento does not support sliding-window layers yet: add --context-length {window}, "
            "within which this model's window hides nothing"
        )


def check_backend(name: str, dtype: str) -> None:
    """Say what is known about an attention backend.

    Args:
        dtype: of the model, as PyTorch spells it.

    Raises:
        ConfigError: Triton's interpreter with a type that it multiplies wrongly.
    """
    if name == TRITON and triton_interpreted() and "bfloat16" in dtype:
        raise ConfigError(
            "Triton's interpreter (TRITON_INTERPRET) multiplies bfloat16 wrongly: add "
            "--dtype float32"
        )
    backend = BACKENDS.get(name)
    if backend is None or not backend.known:
        logger.warning("memento: attention backend %s has not been checked for exactness", name)
    elif name != NATIVE:
        logger.info("memento: attention backend %s: %s", name, backend.known)


def check_architectures(names: Sequence[str]) -> None:
    """Warn of a model class that no test compares with the oracle."""
    known = {name for layout in EXACT for name in layout.architectures}
    if others := [name for name in names if name not in known]:
        logger.warning(
            "memento: %s has not been checked for exactness, see docs/models.md", ", ".join(others)
        )


def layouts_table() -> str:
    """The lines of docs/models.md."""
    return "\n".join(_layouts_table()) + "\n"


def _layouts_table() -> Iterable[str]:
    yield f"| family | attention | exact on `{NATIVE}` | on `{TRITON}`, interpreted |"
    yield "|---|---|---|---|"
    for layout in EXACT:
        found = [_test(layout.tests.get(backend, ("", ""))[0]) for backend in (NATIVE, TRITON)]
        names = ", ".join(f"`{name}`" for name in layout.architectures)
        yield f"| {layout.families} ({names}) | {layout.attention} | {' | '.join(found)} |"


def backends_table() -> str:
    """The lines of docs/scale.md."""
    return "\n".join(_backends_table()) + "\n"


def _backends_table() -> Iterable[str]:
    yield "| backend | page sizes | exactness | test |"
    yield "|---|---|---|---|"
    for name, backend in BACKENDS.items():
        known = backend.known or "unchecked"
        yield f"| `{name}` | {backend.pages} | {known} | {_test(backend.test)} |"
    yield "| others | | unchecked | |"


def _test(name: str) -> str:
    return f"`{name}`" if name else ""
