"""SGLang on any CPU in plain PyTorch, for development and CI; inactive where an accelerator exists.

SGLang 0.5.17's own CPU engine needs a compiled kernel package; as an out-of-tree platform the
plain PyTorch code paths are taken instead. Functionality, not speed.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform class, or None to stay out of the way."""
    if torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available():
        return None
    return "memento_sgl.platform.TorchCpuPlatform"


class TorchCpuPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """A CPU without SGLang's kernel package: `--device cpu --attention-backend torch_native`."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: object) -> None:
        """Keep what the user chose: there is nothing device-specific to set."""

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> Any:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> Any:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
