"""TRL's trainer with the Memento mask: one int per token travels, the mask is made at the model."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from memento_sgl.errors import DataError
from memento_sgl.masks import flex_mask_of, sdpa_mask_of
from memento_sgl.training.rows import Packed


class Packs(Dataset[dict[str, torch.Tensor]]):
    """Packed sequences as the trainer's dataset."""

    column_names: ClassVar = list(Packed._fields)

    def __init__(self, packs: list[Packed]) -> None:
        self._packs = packs

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(values).to(torch.int64)
            for name, values in self._packs[index]._asdict().items()
        }


def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of one packed sequence; `[1, U]` each."""
    (only,) = features
    return {name: values[None] for name, values in only.items()}


class MementoTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` whose model attends by `hidden_from`.

    The mask goes past TRL, which counts tokens by summing an attention mask, straight to the model.
    """

    def __init__(self, *args: Any, attention: str, **kwargs: Any) -> None:
        self._make_mask = flex_mask_of if attention == "flex_attention" else sdpa_mask_of
        self._mask: Any = None
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        model.register_forward_pre_hook(self._attend, with_kwargs=True)

    def _attend(self, _model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"attention_mask": self._mask}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._mask = self._make_mask(inputs.pop("hidden_from")[0])
        return super().compute_loss(model, inputs, *args, **kwargs)


class Watchful(TrainerCallback):  # type: ignore[misc]
    """Adds tokens/s to each log line, and ends a run whose loss is no number."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._tokens = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(float(logs["loss"])):
            raise DataError(
                f"the loss is {logs['loss']} at step {state.global_step}: lower --learning-rate "
                "(the last checkpoint is untouched)"
            )
        tokens, now = int(logs.get("num_tokens", 0)), time.perf_counter()
        logs["tokens_per_second"] = round((tokens - self._tokens) / (now - self._since), 1)
        self._tokens, self._since = tokens, now
