"""SGLang on any CPU in plain PyTorch, for development and CI; inactive where an accelerator exists.

SGLang 0.5.23's own CPU engine needs a compiled kernel package; as an out-of-tree platform the
plain PyTorch code paths are taken instead. Functionality, not speed.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from memento_sgl.cpu.memory import default_memory, describe
from memento_sgl.environment import has_accelerator, share_cpu
from memento_sgl.errors import ConfigError
from memento_sgl.offline.simulate.model_shape import shape_of

logger = logging.getLogger(__name__)
ELEMENT_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "half": 2}


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform class, or None to stay out of the way."""
    return None if has_accelerator() else "memento_sgl.cpu.platform.TorchCpuPlatform"


class TorchCpuPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """A CPU without SGLang's kernel package: `--device cpu --attention-backend torch_native`."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Constrain answers with outlines: xgrammar's masks need an accelerator. An idle scheduler
        leaves the cores to others instead of spinning. Ranks share all cores, and those of a
        tensor-parallel group talk through gloo alone. Memory: see `cpu.memory`."""
        server_args.sleep_on_idle = True
        if server_args.max_total_tokens is None:
            _bound_memory(server_args)
        if (ranks := server_args.tp_size * server_args.dp_size) > 1:
            share_cpu(ranks)
        if server_args.tp_size > 1:
            server_args.disable_custom_all_reduce = True
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "outlines"
        elif server_args.grammar_backend == "xgrammar":
            raise ConfigError("xgrammar does not run on this CPU: use --grammar-backend outlines")

    def get_default_attention_backend(self) -> str:
        return "torch_native"


def _bound_memory(server_args: Any) -> None:
    """Set the default size of the KV pool and of the batch."""
    from sglang.srt.utils.hf_transformers_utils import get_config, get_context_length

    config = get_config(
        server_args.model_path,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.revision,
    )
    shape = shape_of(config.to_dict(), server_args.model_path)
    told = server_args.kv_cache_dtype
    told = server_args.dtype if told == "auto" else told
    element = 1 if told.startswith("fp8") else ELEMENT_BYTES.get(told, shape.element_bytes)
    token_bytes = shape.kv_bytes(1) / shape.element_bytes * element
    context = server_args.context_length or get_context_length(config)
    memory = default_memory(token_bytes, context, server_args.max_running_requests)
    server_args.max_total_tokens = memory.tokens
    server_args.max_running_requests = memory.running
    logger.info(describe(memory, token_bytes))
