"""`memento train`: stages one after the other, each resumable, each a model folder of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from memento_sgl.errors import ConfigError, StoreError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import resolve_markers
from memento_sgl.training.measure import Measured, measure
from memento_sgl.training.rows import Stage, TrainingRow, check_tokens, pack_rows
from memento_sgl.training.trainer import MementoTrainer, collate, packs_dataset

Attention = Literal["auto", "sdpa", "flex_attention"]
SETTINGS, DONE = "training.json", "done.json"
FREE = ("logging_steps", "save_steps")  # may change when a run goes on


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train. Defaults are the paper's where it says something (stage: 5 epochs, 8e-5 cosine,
    5 % warm-up, AdamW without decay, batches of 512).

    Attributes:
        model: folder of the model to begin with, with the markers in its tokenizer.
        batch_size: packed sequences per optimizer step, over all processes.
        pack_tokens: most tokens of a packed sequence.
        lora: rank; 0 trains all weights. The rows of the markers and of the thought's tags in the
            embeddings are trained in any case.
        in_order: keep the rows' order (a curriculum) instead of shuffling packs.
        held_out: rows that are only measured; drawn by `seed`.
    """

    model: str
    stages: tuple[Stage, ...] = ("full", "memento")
    epochs: float = 5.0
    learning_rate: float = 8e-5
    warmup: float = 0.05
    batch_size: int = 512
    pack_tokens: int = 32768
    lora: int = 0
    attention: Attention = "auto"
    bf16: bool = False
    gradient_checkpointing: bool = False
    in_order: bool = False
    held_out: int = 16
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 200


class Training:
    """One run in a folder.

    Raises:
        ConfigError: settings or a model that cannot work.
        DataError: rows of another model.
        StoreError: the folder holds a run with other settings or data.
    """

    def __init__(self, rows: Sequence[TrainingRow], out: Path, settings: TrainSettings) -> None:
        if not settings.stages:
            raise ConfigError("give at least one stage: full, memento")
        self._settings = settings
        self._out = out
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
        markers = resolve_markers(config, self.tokenizer)
        self._markers = markers[:4]
        tags = markers.think_start, markers.think_end
        self._new_rows = [*self._markers, *(tag for tag in tags if tag is not None)]
        vocabulary = AutoConfig.from_pretrained(settings.model).get_text_config().vocab_size
        check_tokens(rows, vocabulary, self._markers)
        order = list(range(len(rows)))
        random.Random(settings.seed).shuffle(order)
        count = settings.held_out
        if count >= len(rows):
            raise ConfigError(f"--held-out {count}: there are only {len(rows)} rows")
        apart = set(order[:count])
        self.held_out = [row for number, row in enumerate(rows) if number in apart]
        self.rows = [row for number, row in enumerate(rows) if number not in apart]

    @property
    def attention(self) -> str:
        """FlexAttention has no backward pass on a CPU."""
        if self._settings.attention != "auto":
            return self._settings.attention
        return "flex_attention" if torch.cuda.is_available() else "sdpa"

    def run(self) -> dict[str, Measured | None]:
        """Train all stages that are not done yet; figures by stage (None: nothing held out)."""
        self._out.mkdir(parents=True, exist_ok=True)
        self._keep_settings()
        found: dict[str, Measured | None] = {}
        model: str | Path = self._settings.model
        for number, stage in enumerate(self._settings.stages, start=1):
            folder = self._out / f"{number}-{stage}"
            if not (folder / DONE).exists():
                self._stage(stage, model, folder)
            done = json.loads((folder / DONE).read_text(encoding="utf-8"))
            found[folder.name] = Measured(**done) if done else None
            model = folder
        return found

    def _keep_settings(self) -> None:
        now = {
            "settings": json.loads(json.dumps(asdict(self._settings))),
            "rows": len(self.rows),
            "tokens": sum(len(row.input_ids) for row in self.rows),
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        }
        path = self._out / SETTINGS
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                name
                for name, value in now["settings"].items()
                if name not in FREE and before["settings"].get(name) != value
            ]
            changed += [name for name in ("rows", "tokens") if before[name] != now[name]]
            if changed:
                raise StoreError(
                    f"{self._out} holds a run with another {', '.join(changed)}: give another --out"
                )
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")

    def _stage(self, stage: Stage, start: str | Path, folder: Path) -> None:
        settings = self._settings
        set_seed(settings.seed)
        model = AutoModelForCausalLM.from_pretrained(
            start,
            attn_implementation=self.attention,
            dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        )
        trainer = MementoTrainer(
            model=model,
            args=self._arguments(folder / "checkpoints"),
            attention=self.attention,
            train_dataset=packs_dataset(pack_rows(self.rows, stage, settings.pack_tokens)),
            data_collator=collate,
            processing_class=self.tokenizer,
            peft_config=self._lora(model) if settings.lora else None,
        )
        checkpoints = folder / "checkpoints"
        last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        trained = trainer.trained_model()
        if settings.lora:
            trained = trained.merge_and_unload()
            if trainer.is_world_process_zero():
                trained.save_pretrained(folder)
        else:
            trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            self.tokenizer.save_pretrained(folder)
            trained.set_attn_implementation("sdpa")
            measured = (
                measure(trained, self.held_out, stage, self._markers).as_dict()
                if self.held_out
                else None
            )
            (folder / DONE).write_text(json.dumps(measured) + "\n", encoding="utf-8")
        trainer.accelerator.wait_for_everyone()

    def _arguments(self, folder: Path) -> SFTConfig:
        settings = self._settings
        arguments = SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=1,  # a pack fills it
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup,
            weight_decay=0.0,
            bf16=settings.bf16,
            gradient_checkpointing=settings.gradient_checkpointing,
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            save_steps=settings.save_steps,
            save_total_limit=2,
            seed=settings.seed,
            data_seed=settings.seed,
            train_sampling_strategy="sequential" if settings.in_order else "random",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        steps, rest = divmod(settings.batch_size, arguments.world_size)
        if rest:
            raise ConfigError(
                f"--batch-size {settings.batch_size} does not divide by {arguments.world_size} "
                "processes"
            )
        arguments.gradient_accumulation_steps = steps
        return arguments

    def _lora(self, model: Any) -> Any:
        from peft import LoraConfig

        tied = model.config.get_text_config().tie_word_embeddings
        rows = {"embed_tokens": self._new_rows}
        if not tied:
            rows["lm_head"] = self._new_rows
        return LoraConfig(
            r=self._settings.lora,
            lora_alpha=2 * self._settings.lora,
            target_modules="all-linear",
            trainable_token_indices=rows,
            task_type="CAUSAL_LM",
        )


def memory_of_a_step(training: Training, settings: TrainSettings) -> dict[str, float]:
    """GB that one step holds on one device, activations of the layers aside."""
    config = AutoConfig.from_pretrained(settings.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = 2 if settings.bf16 else 4
    trained = weights if not settings.lora else 0
    tokens = settings.pack_tokens
    text = config.get_text_config()
    mask = tokens * tokens if training.attention == "sdpa" else 4 * tokens
    found = {
        "weights": weights * size,
        "gradients": trained * size,
        "AdamW states": trained * 8,
        "logits of one sequence": tokens * text.vocab_size * 4,
        "attention mask": mask,
        "hidden states, one per layer": tokens * text.hidden_size * text.num_hidden_layers * size,
    }
    return {name: count / 1e9 for name, count in found.items()}


def check_model(path: str) -> None:
    """Raises ConfigError where there is no model folder."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path} is no model folder: it has no config.json")
