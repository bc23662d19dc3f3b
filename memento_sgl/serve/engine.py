"""Offline generation in Python: SGLang's `Engine` with block eviction."""

from __future__ import annotations

import multiprocessing
from typing import Any

from sglang.srt.entrypoints.engine import Engine as SglEngine
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from memento_sgl.environment import has_accelerator
from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.serve.arguments import enable, required_arguments


class Engine(SglEngine):  # type: ignore[misc]
    """`sglang.Engine` that evicts finished blocks.

        engine = memento_sgl.Engine(model_path="...", memento={"keep_last_n_blocks": 0})
        engine.generate(prompt, {"temperature": 0, "max_new_tokens": 4096})

    Args:
        memento: options; `enable` is implied.
        kwargs: everything that `sglang.Engine` takes.

    Each output's `meta_info["memento"]` holds the request's accounting.

    Raises:
        ConfigError: options or engine flags that do not go together, before weights load.
    """

    def __init__(
        self, *, memento: MementoConfig | dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # Set while a new process imports the program that started it.
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit(
                "memento: the engine's own processes import this program again: create the engine "
                'below `if __name__ == "__main__":`'
            )
        if isinstance(memento, MementoConfig):
            memento = memento.model_dump(exclude_unset=True)
        config = MementoConfig.parse({"enable": True} | (memento or {}))
        if not config.enable:
            raise ConfigError("memento_sgl.Engine evicts: use sglang.Engine for a stock engine")
        load_plugins()
        if kwargs.get("device") is None and not has_accelerator():
            kwargs["device"] = "cpu"  # SGLang itself does not find this platform's device
        required = required_arguments(config, kwargs)
        server_args = ServerArgs(**{"log_level": "error", **kwargs, **required})
        enable(server_args, config)
        super().__init__(server_args=server_args)
