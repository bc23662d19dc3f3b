"""TRL's trainer with the Memento mask: one int per token travels, the mask is made at the model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from memento_sgl.errors import DataError
from memento_sgl.offline.masks import flex_mask_of, sdpa_mask_of
from memento_sgl.training.rows import Packed


def packs_dataset(packs: Sequence[Packed]) -> Dataset:
    """Packed sequences as TRL wants them."""
    columns = {name: [getattr(each, name) for each in packs] for name in Packed._fields}
    return Dataset.from_dict(columns).with_format("torch")


def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of one packed sequence; `[1, U]` each."""
    (only,) = features
    return {name: values[None].to(torch.int64) for name, values in only.items()}


class MementoTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` whose model attends by `hidden_from`.

    The mask goes past TRL, which counts tokens by summing an attention mask, straight to the model.
    """

    def __init__(self, *args: Any, attention: str, **kwargs: Any) -> None:
        self._make_mask = flex_mask_of if attention == "flex_attention" else sdpa_mask_of
        self._mask: Any = None
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self._hook = model.register_forward_pre_hook(self._attend, with_kwargs=True)
        head = model.get_output_embeddings()
        if not hasattr(head, "bias"):
            # TRL reads the head's weight and bias; PEFT's wrapper of token rows has no bias.
            head.bias = None
        self._counted = (0.0, time.perf_counter())

    def trained_model(self) -> Any:
        """The model when training is over, without the mask of the last step."""
        self._hook.remove()
        return self.accelerator.unwrap_model(self.model)

    def _attend(self, _model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"attention_mask": self._mask}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._mask = self._make_mask(inputs.pop("hidden_from")[0])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds tokens/s.

        Raises:
            DataError: the loss is no number.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DataError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower "
                    "--learning-rate (the last checkpoint is untouched)"
                )
            tokens, now = self._total_train_tokens, time.perf_counter()
            speed = (tokens - self._counted[0]) / (now - self._counted[1])
            logs = logs | {"tokens_per_second": round(speed, 1)}
            self._counted = (tokens, now)
        super().log(logs, *args, **kwargs)
