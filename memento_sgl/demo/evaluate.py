"""Measure the embedded model on held-out problems and write its card.

Whole outputs are compared: teacher-forced argmax equality of every token is the same as greedy
generation giving exactly that output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import MAX_BLOCKS, MAX_DIGITS, QUESTION, Problem, held_out
from memento_sgl.demo.train import encode
from memento_sgl.offline.reference import masked_logits
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import Eviction, replay
from memento_sgl.rule.markers import resolve_markers

MODES = {
    "with eviction": MementoConfig(enable=True, mask_delimiters=False),
    "without eviction": MementoConfig(enable=True, mask_delimiters=False, keep_last_n_blocks=-1),
    "restart mode": MementoConfig(enable=True, mask_delimiters=False, restart_mode=True),
}


def exact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problem: Problem,
    config: MementoConfig,
    *,
    hide_mementos: bool = False,
) -> bool:
    """Whether greedy decoding gives exactly the problem's output under these options.

    With `hide_mementos` a block's memento disappears together with the block.
    """
    prompt, output = encode(tokenizer, problem)
    tokens = prompt + output
    markers = resolve_markers(config, tokenizer)
    machine = replay(tokens, len(prompt), markers, config)
    evictions = machine.evictions
    if hide_mementos:
        evictions = [
            Eviction(b.summary_end, b.start + 1, b.summary_end, b.summary_end)
            for b in machine.blocks
        ]
    logits = masked_logits(model, tokens, evictions)
    expected = torch.tensor(output)
    return bool((logits[len(prompt) - 1 : -1].argmax(-1) == expected).all())


def accuracy(folder: Path, problems: list[Problem]) -> dict[str, float]:
    """Share of exactly solved problems in each mode."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = {}
    for name, config in MODES.items():
        hits = [exact(model, tokenizer, p, config) for p in track(problems, description=name)]
        result[name] = sum(hits) / len(hits)
    name = "mementos hidden too"
    config = MODES["with eviction"]
    hits = [exact(model, tokenizer, p, config, hide_mementos=True) for p in problems]
    result[name] = sum(hits) / len(hits)
    return result


def main(
    folder: Path = typer.Option(MODEL_DIR, help="The checkpoint."),
    count: int = typer.Option(230, help="Held-out problems, block counts 2 to 24 in turn."),
    threads: int = typer.Option(2, help="CPU threads."),
) -> None:
    """Measure all modes and write README.md beside the checkpoint."""
    torch.set_num_threads(threads)
    problems = held_out(count)
    final = accuracy(folder, problems)
    first = accuracy(folder / "stage1", problems) if (folder / "stage1").is_dir() else None
    training = json.loads((folder / "training.json").read_text())
    training["accuracy"] = final
    if first is not None:
        training["accuracy_stage1"] = first
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    (folder / "README.md").write_text(card(training, count))


def card(training: dict[str, Any], count: int) -> str:
    """The model card, all figures from the training record."""
    final: dict[str, float] = training["accuracy"]
    first: dict[str, float] = training.get("accuracy_stage1", {})
    rows = "\n".join(
        f"| {name} | {value:.1%} | {f'{first[name]:.1%}' if name in first else '-'} |"
        for name, value in final.items()
    )
    steps, seconds = training["steps"], training["seconds"]
    more = "".join(
        f"\nThen {count} more steps of the second stage ({time} s)."
        for count, time in zip(steps[2:], seconds[2:], strict=True)
    )
    if more:
        more += (
            "\nThese taught it other words of the question; stage 1 was measured with the former."
        )
    return f"""---
license: apache-2.0
---
# The embedded model of memento-sgl

A Qwen3-architecture model of {training["parameters"]:,} parameters (float32) that sums digits,
modulo 100, group by group, and keeps the running total in mementos. It exists so that the runtime
can be shown and tested for real on any machine; it knows nothing else.

    {QUESTION} a372 b91        3+7+2 = 12, 12+9+1 = 22: "The total is 22."

A question is made of groups, each a letter (a to z, then A to Z, in this order) and one to
{MAX_DIGITS} digits, {MAX_BLOCKS} groups at most. `memento serve demo` refuses longer groups.

| exactly solved, {count} held-out problems of 2 to 24 blocks | final | after stage 1 |
|---|---|---|
{rows}

Trained in the two stages of the Memento paper: full attention ({steps[0]} steps, {seconds[0]} s),
then the Memento mask with delimiters visible ({steps[1]} steps, {seconds[1]} s), seed
{training["seed"]}, {training["tokens_per_step"]} tokens a step, on CPU.{more}
The mask is part of the model: that is why "without eviction" differs. With the mementos hidden as
well, the total cannot be known.

- Data: generated by `memento_sgl/demo/task.py`; held-out problems use a seed of their own.
- Rebuild: `make demo-model` (training, then this card by `python -m memento_sgl.demo.evaluate`).
- Licence: Apache-2.0.
"""


if __name__ == "__main__":
    typer.run(main)
