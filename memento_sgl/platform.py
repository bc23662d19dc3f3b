"""SGLang on any CPU in plain PyTorch, for development and CI; inactive where an accelerator exists.

SGLang 0.5.23's own CPU engine needs a compiled kernel package; as an out-of-tree platform the
plain PyTorch code paths are taken instead. Functionality, not speed.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from memento_sgl.environment import has_accelerator, share_cpu
from memento_sgl.errors import ConfigError


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform class, or None to stay out of the way."""
    return None if has_accelerator() else "memento_sgl.platform.TorchCpuPlatform"


class TorchCpuPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """A CPU without SGLang's kernel package: `--device cpu --attention-backend torch_native`."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Constrain answers with outlines: xgrammar's masks need an accelerator. An idle scheduler
        leaves the cores to others instead of spinning. Tensor-parallel ranks talk through gloo
        alone and share all cores."""
        server_args.sleep_on_idle = True
        if server_args.tp_size > 1:
            share_cpu(server_args.tp_size)
            server_args.disable_custom_all_reduce = True
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "outlines"
        elif server_args.grammar_backend == "xgrammar":
            raise ConfigError("xgrammar does not run on this CPU: use --grammar-backend outlines")

    def get_default_attention_backend(self) -> str:
        return "torch_native"
