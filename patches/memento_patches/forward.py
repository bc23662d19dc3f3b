"""Seam: positions and sampling of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memento_sgl.engine import runtime


def after_init_new(forward_batch: Any, *_args: Any, **_kwargs: Any) -> None:
    known, positions = runtime.current().positions, forward_batch.positions
    if not known.evicting or positions is None or positions.numel() == 0:
        return
    offsets = known.offsets[forward_batch.req_pool_indices]
    if forward_batch.forward_mode.is_extend():
        offsets = torch.repeat_interleave(
            offsets, forward_batch.extend_seq_lens, output_size=forward_batch.extend_num_tokens
        )
    forward_batch.positions = positions + offsets.to(positions.dtype)


def around_sample(
    original: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any
) -> Any:
    automaton = runtime.current().emission.automaton
    if automaton is None:
        return original(runner, logits_output, forward_batch)
    slots = forward_batch.req_pool_indices
    automaton.constrain(slots, logits_output.next_token_logits)
    tokens = original(runner, logits_output, forward_batch)
    automaton.advance(slots, tokens)
    return tokens
