"""`memento train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from memento_sgl.errors import ConfigError
from memento_sgl.exit_codes import as_exit_code

HELP = """Train a Memento model in the paper's two stages: full attention, then the Memento mask.

MODEL is a Hugging Face model folder with the marker tokens (memento init-model). DATA are tokenized
rows: Parquet files or folders, written by `memento convert --train-tokenizer MODEL`.
Each stage ends in a folder of its own under --out, ready for `memento serve`. Ended early, the same
command goes on at the last checkpoint. Needs the extra `train`.

    memento train ./qwen3-memento work/tokenized --out run --bf16

    memento train ./qwen3-memento work/tokenized --out run --lora 32 --pack-tokens 16384

    accelerate launch --config_file fsdp.yaml -m memento_sgl.cli.app train ...   # several GPUs

Defaults are the paper's: 5 epochs a stage, learning rate 8e-5 (cosine, 5 % warm-up), AdamW without
decay, 512 sequences per step. On a GPU the mask is FlexAttention's, on a CPU SDPA's.

Exit code: 0 done, 2 usage or data that cannot be used, 6 --out holds another run, 130 interrupted.
"""


def train(
    model: Annotated[Path, Argument(metavar="MODEL", help="Model folder.")],
    data: Annotated[list[Path], Argument(metavar="DATA...", help="Tokenized rows.")],
    out: Annotated[Path, Option("--out", "-o", help="Folder of the run.")],
    stages: Annotated[
        str, Option("--stages", help="full, memento, or both with a comma.")
    ] = "full,memento",
    epochs: Annotated[float, Option("--epochs", help="Per stage.", min=0.0)] = 5.0,
    learning_rate: Annotated[float, Option("--learning-rate", min=0.0)] = 8e-5,
    warmup: Annotated[float, Option("--warmup", help="Share of steps.", min=0.0, max=0.99)] = 0.05,
    batch_size: Annotated[
        int, Option("--batch-size", help="Packed sequences per step, all processes.", min=1)
    ] = 512,
    pack_tokens: Annotated[
        int, Option("--pack-tokens", help="Most tokens of a packed sequence.", min=2)
    ] = 32768,
    lora: Annotated[int, Option("--lora", help="Rank; 0: all weights.", min=0)] = 0,
    attention: Annotated[str, Option("--attention", help="auto, sdpa or flex_attention.")] = "auto",
    bf16: Annotated[bool, Option("--bf16", help="Train in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    in_order: Annotated[bool, Option("--in-order", help="Keep the rows' order.")] = False,
    held_out: Annotated[int, Option("--held-out", help="Rows only measured.", min=0)] = 16,
    seed: Annotated[int, Option("--seed")] = 0,
    logging_steps: Annotated[int, Option("--logging-steps", min=1)] = 10,
    save_steps: Annotated[int, Option("--save-steps", help="Between checkpoints.", min=1)] = 200,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what one step holds in memory, and end.")
    ] = False,
) -> None:
    values = dict(locals())
    again = "give the same command to go on at the last checkpoint"
    raise typer.Exit(as_exit_code(lambda: _train(values), again))


def _train(values: dict[str, Any]) -> int:
    from memento_sgl.training.rows import read_training_rows

    try:
        from memento_sgl.training.stages import (
            Training,
            TrainSettings,
            check_model,
            memory_of_a_step,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"training needs the extra `train` ({error.name} is missing): pip install "
            "'memento-sgl[train]'"
        ) from None

    dry_run, data, out = (values.pop(name) for name in ("dry_run", "data", "out"))
    stages = tuple(part.strip() for part in values.pop("stages").split(","))
    if unknown := [stage for stage in stages if stage not in ("full", "memento")]:
        raise ConfigError(f"--stages {unknown[0]!r}: expected full, memento, or both with a comma")
    if values["attention"] not in ("auto", "sdpa", "flex_attention"):
        raise ConfigError(f"--attention {values['attention']!r}: auto, sdpa or flex_attention")
    model = str(values.pop("model"))
    check_model(model)
    settings = TrainSettings(model=model, stages=stages, **values)
    training = Training(read_training_rows(data), out, settings)
    tokens = sum(len(row.input_ids) for row in training.rows)
    print(
        f"{len(training.rows):,} rows, {tokens:,} tokens, {len(training.held_out):,} held out; "
        f"attention: {training.attention}",
        file=sys.stderr,
    )
    if dry_run:
        for name, gigabytes in memory_of_a_step(training, settings).items():
            print(f"{name:32} {gigabytes:10.3f} GB")
        return 0
    for stage, measured in training.run().items():
        figures = (
            "nothing held out"
            if measured is None
            else f"loss {measured.loss:.4f}, markers right {measured.marker_accuracy:.1%}, "
            f"mementos {measured.memento_ratio:.2f} of their length, "
            f"{measured.mementos_closed:.0%} closed"
        )
        print(f"{out / stage}: {figures}")
    return 0


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(help=HELP, rich_help_panel="Build data and models")(train)
