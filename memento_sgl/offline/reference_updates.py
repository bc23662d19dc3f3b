"""The oracle of a request that lived through weight updates: who computed which KV.

    row of logits   0 ............ start ............. T-1
    kept            [ earlier weights ][ later weights, over the KV that the earlier ones left ]
    recomputed      [ earlier weights ][ later weights, over KV of their own              ]

A paused server (`in_place`) that is given other weights keeps the KV it has; a request that was
retracted, or comes later, has everything computed again. Slow and plain, like `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memento_sgl.offline.reference import lay_out, masked_logits
from memento_sgl.rule.machine import Eviction

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Phase(NamedTuple):
    """`model` makes the logits from logical index `start` on: it chose the tokens behind it."""

    model: PreTrainedModel
    start: int


def recomputed_logits(
    phases: Sequence[Phase], tokens: Sequence[int], evictions: Sequence[Eviction]
) -> torch.Tensor:
    """Logits where each phase began with all KV computed again; float `[T, vocabulary]`.

    Args:
        phases: rising by `start`, the first at 0.
    """
    parts = [
        masked_logits(phase.model, tokens[:end], evictions)[start:]
        for phase, (start, end) in zip(phases, _spans(phases, len(tokens)), strict=True)
    ]
    return torch.cat(parts)


def kept_logits(
    phases: Sequence[Phase], tokens: Sequence[int], evictions: Sequence[Eviction]
) -> torch.Tensor:
    """Logits where each phase went on with the KV of those before; float `[T, vocabulary]`.

    Args:
        phases: rising by `start`, the first at 0.
    """
    from transformers import DynamicCache

    layout = lay_out(evictions, len(tokens))
    ids = torch.tensor(list(tokens))[layout.logical]
    cache = DynamicCache()
    parts: list[torch.Tensor] = []
    total = len(layout.logical)
    entries = [int(layout.first[phase.start]) for phase in phases] + [total]
    entries[0] = 0
    for phase, (low, high) in zip(phases, pairwise(entries), strict=True):
        visible = layout.visible[low:high, :high]
        bias = torch.zeros(visible.shape, dtype=phase.model.dtype)
        bias.masked_fill_(~visible, torch.finfo(phase.model.dtype).min)
        with torch.no_grad():
            out: Any = phase.model(
                input_ids=ids[None, low:high],
                position_ids=layout.logical[None, low:high],
                attention_mask=bias[None, None],
                past_key_values=cache,
                use_cache=True,
            )
        parts.append(out.logits[0])
    return torch.cat(parts)[layout.first]


def _spans(phases: Sequence[Phase], length: int) -> list[tuple[int, int]]:
    borders = [phase.start for phase in phases] + [length]
    assert borders[0] == 0
    assert all(low < high for low, high in pairwise(borders)), borders
    return list(pairwise(borders))
