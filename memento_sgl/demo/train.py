"""Train the embedded model in the paper's two stages: full attention, then the Memento mask.

    python -m memento_sgl.demo.train            # or: make demo-model

About 20 minutes on 2 CPU cores. Batches hold problems of one size, so that no token is padding.
Problems grow during each stage: finding a group by its label is learned on two groups in seconds
and on many groups not at all.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import MAX_DIGITS, TRAINED_BLOCKS, Problem
from memento_sgl.demo.tokenizer import build_tokenizer

SEED = 17
TOKENS_PER_STEP = 2048
PEAK_RATE = 2e-3
WARMUP = 60
# Share of a stage's steps from which problems have up to so many blocks.
GROWTH1 = ((0.0, 2), (0.15, 4), (0.3, 8), (0.45, 16), (0.6, TRAINED_BLOCKS))
GROWTH2 = ((0.0, 4), (0.04, 8), (0.08, 16), (0.16, TRAINED_BLOCKS))
console = Console()


class Batch(NamedTuple):
    """Token ids int64 `[B, T]`; labels with -100 over the prompt; `visible` bool `[B, 1, T, T]`."""

    ids: torch.Tensor
    labels: torch.Tensor
    visible: torch.Tensor


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of about 0.45 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[list[int], list[int]]:
    """Prompt and output ids of one chat turn, the end-of-turn token included."""
    prompt = tokenizer.apply_chat_template(
        problem.messages, add_generation_prompt=True, tokenize=False
    )
    return (
        tokenizer.encode(prompt, add_special_tokens=False),
        tokenizer.encode(problem.output + "<|im_end|>", add_special_tokens=False),
    )


def memento_mask(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The default mask of well-formed rows, vectorised: bool `[B, 1, T, T]`.

    A token strictly inside a block is hidden from the first `<|summary_end|>` after it on.
    """
    start, end, close = (
        ids == tokenizer.convert_tokens_to_ids(marker)
        for marker in ("<|block_start|>", "<|block_end|>", "<|summary_end|>")
    )
    length = ids.shape[1]
    inside = (start.long().cumsum(1) > end.long().cumsum(1)) & ~start
    closed = close.long().cumsum(1)
    index = torch.arange(length)
    gone = inside[:, None, :] & (closed[:, :, None] > closed[:, None, :])
    return ((index[:, None] >= index[None, :])[None] & ~gone)[:, None]


def make_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, masked: bool, progress: float
) -> Batch:
    """Problems of one random size, which grows with `progress` (0 .. 1) of the stage."""
    growth = GROWTH2 if masked else GROWTH1
    longest = next(size for start, size in reversed(growth) if progress >= start)
    blocks = rng.randint(1, longest)
    if masked:  # long problems are what is left to learn
        blocks = max(blocks, rng.randint(1, longest))
    lengths = [rng.randint(1, MAX_DIGITS) for _ in range(blocks)]
    estimate = 45 + blocks * 12 + 9 * sum(lengths)
    rows = []
    for _ in range(max(1, TOKENS_PER_STEP // estimate)):
        rng.shuffle(lengths)  # same total length in every row of the batch
        groups = tuple("".join(rng.choices("0123456789", k=n)) for n in lengths)
        rows.append(encode(tokenizer, Problem(groups)))
    ids = torch.tensor([prompt + output for prompt, output in rows])
    labels = ids.clone()
    labels[:, : len(rows[0][0])] = -100
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    return Batch(ids, labels, memento_mask(ids, tokenizer) if masked else causal)


def batches(
    seed: int, steps: int, tokenizer: PreTrainedTokenizerFast, masked: bool
) -> Iterator[Batch]:
    rng = random.Random(seed)
    for step in range(steps):
        yield make_batch(rng, tokenizer, masked, step / steps)


def run_stage(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    *,
    masked: bool,
    peak: float = PEAK_RATE,
) -> float:
    """Train for `steps` steps; `peak` is the highest learning rate. Returns the seconds it took."""
    name = "stage 2 (Memento mask)" if masked else "stage 1 (full attention)"
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(batches(SEED + masked, steps, tokenizer, masked)):
        rate = peak * min(1.0, (step + 1) / WARMUP)
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=batch.ids, attention_mask=batch.visible).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            wrong = (logits[:, :-1].argmax(-1) != batch.labels[:, 1:])[batch.labels[:, 1:] != -100]
            console.print(
                f"{name} step {step}/{steps} {time.monotonic() - started:.0f}s "
                f"loss {loss.item():.4f} token errors {wrong.float().mean().item():.5f} "
                f"length {batch.ids.shape[1]}"
            )
    return time.monotonic() - started


def save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    record: dict[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main(
    out: Path = typer.Option(MODEL_DIR, help="Where the checkpoint goes."),
    steps1: int = typer.Option(2500, help="Steps of stage 1."),
    steps2: int = typer.Option(5000, help="Steps of stage 2."),
    threads: int = typer.Option(2, help="CPU threads."),
    resume: bool = typer.Option(False, help="Take stage 1 from OUT/stage1 if it is there."),
    rate: float = typer.Option(PEAK_RATE, help="Highest learning rate of stage 2."),
    start: Path | None = typer.Option(
        None, help="Only stage 2, from this checkpoint: for another wording of the question."
    ),
) -> None:
    """Train the embedded model and write the checkpoint with its training record."""
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    tokenizer = build_tokenizer()
    first = out / "stage1"
    if start is not None:
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        record = json.loads((start / "training.json").read_text())
    elif resume and (first / "training.json").is_file():
        model = Qwen3ForCausalLM.from_pretrained(first, dtype=torch.float32)
        record = json.loads((first / "training.json").read_text())
    else:
        model = build_model(tokenizer)
        seconds = run_stage(model, tokenizer, steps1, masked=False)
        record = {
            "seed": SEED,
            "steps": [steps1],
            "seconds": [round(seconds)],
            "parameters": model.num_parameters(),
            "tokens_per_step": TOKENS_PER_STEP,
            "mask_delimiters": False,
        }
        save(model, tokenizer, first, record)
    seconds = run_stage(model, tokenizer, steps2, masked=True, peak=rate)
    record["steps"].append(steps2)
    record["seconds"].append(round(seconds))
    save(model, tokenizer, out, record)


if __name__ == "__main__":
    typer.run(main)
