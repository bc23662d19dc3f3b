"""The definition in PyTorch and Hugging Face: the attention mask of block eviction, and greedy
generation with it. Trainers need the same mask; the tests use it as the oracle of the runtime.

    visible(q) = { k <= q : no evicted span containing k has an eviction point p <= q }

In restart mode a memento's KV exists twice, first with and then without its block. Such a sequence
is unrolled: the recomputed tokens appear a second time, at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memento_sgl.offline.masks import mask_fields, sdpa_mask
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import NO_STRUCTURE, Permitted, Structure, permitted, special_tokens
from memento_sgl.rule.machine import BlockMachine, Eviction, section_start_of
from memento_sgl.rule.markers import MarkerIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedSequence(NamedTuple):
    """One sequence laid out for a single masked forward pass over U >= T entries.

    Attributes:
        logical: logical index of every entry, also its rope position; int64 `[U]`.
        visible: which entries an entry attends to; bool `[U, U]`, row = query.
        first: entry whose logits chose the token after each logical index; int64 `[T]`.
    """

    logical: torch.Tensor
    visible: torch.Tensor
    first: torch.Tensor


def attention_mask(evictions: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Bool `[length, length]`, true where query (row) sees key (column), without unrolling.

    Args:
        evictions: `(point, start, end)` or `(point, start, end, resume)` each.
        length: tokens of the sequence.

    Raises:
        DataError: an eviction that cannot be one.
    """
    return sdpa_mask(mask_fields([eviction[:3] for eviction in evictions], length))[0, 0]


def lay_out(evictions: Sequence[Eviction], length: int) -> MaskedSequence:
    """Lay a sequence of `length` tokens out, recomputed mementos (restart mode) twice."""
    fields = mask_fields(evictions, length)
    return MaskedSequence(
        logical=torch.from_numpy(fields.source).to(torch.int64),
        visible=sdpa_mask(fields)[0, 0],
        first=torch.from_numpy(fields.chooses).nonzero()[:, 0],
    )


def masked_logits(
    model: PreTrainedModel, tokens: Sequence[int], evictions: Sequence[Eviction]
) -> torch.Tensor:
    """Logits of every logical index under the mask; float `[T, vocabulary]`."""
    layout = lay_out(evictions, len(tokens))
    device = model.device
    ids = torch.tensor(list(tokens))[layout.logical].to(device)
    bias = torch.zeros(layout.visible.shape, dtype=model.dtype)
    bias.masked_fill_(~layout.visible, torch.finfo(model.dtype).min)
    with torch.no_grad():
        out: Any = model(
            input_ids=ids[None],
            position_ids=layout.logical[None].to(device),
            attention_mask=bias[None, None].to(device),
            use_cache=False,
        )
    logits: torch.Tensor = out.logits[0, layout.first.to(device)]
    return logits


def constrained(logits: torch.Tensor, may: Permitted, special: Sequence[int]) -> torch.Tensor:
    """Logits of one position with everything at -inf that constrained emission forbids.

    Args:
        logits: float `[vocabulary]`.
        may: what may come next.
        special: `emission.special_tokens`.
    """
    banned = torch.full_like(logits, not may.text, dtype=torch.bool)
    for token in special:
        banned[token] = token not in may.special
    return logits.masked_fill(banned, float("-inf"))


def generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    config: MementoConfig,
    markers: MarkerIds,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    assistant_start: int | None = None,
    structure: Structure = NO_STRUCTURE,
) -> list[int]:
    """Greedy generation by recomputing everything under the mask at each step. Slow and plain.

    Returns the new tokens; a stop token is included.
    """
    tokens = list(prompt)
    start = section_start_of(tokens, config, markers, assistant_start)
    machine = BlockMachine(markers, config, section_start=start)
    machine.feed_all(tokens)
    special = special_tokens(markers, structure)
    while len(tokens) < len(prompt) + max_new_tokens:
        may = permitted(machine, len(tokens), config, markers, structure)
        logits = masked_logits(model, tokens, machine.evictions)[-1]
        token = int(constrained(logits, may, special).argmax())
        machine.feed_all([token], start=len(tokens))
        tokens.append(token)
        if token in stop:
            break
    return tokens[len(prompt) :]


class Mismatch(NamedTuple):
    """Where greedy tokens leave the oracle: logical position, token found, token expected, and how
    far apart the two logits are."""

    position: int
    found: int
    expected: int
    gap: float


def check_greedy(
    model: PreTrainedModel,
    prompt: Sequence[int],
    output: Sequence[int],
    config: MementoConfig,
    markers: MarkerIds,
    *,
    assistant_start: int | None = None,
    structure: Structure = NO_STRUCTURE,
) -> list[Mismatch]:
    """Compare an output with greedy decoding under the mask, in one forward pass.

    An output without mismatches is exactly what `generate` gives.
    """
    return compare_greedy(
        partial(masked_logits, model),
        prompt,
        output,
        config,
        markers,
        assistant_start=assistant_start,
        structure=structure,
    )


def compare_greedy(
    logits_of: Callable[[Sequence[int], Sequence[Eviction]], torch.Tensor],
    prompt: Sequence[int],
    output: Sequence[int],
    config: MementoConfig,
    markers: MarkerIds,
    *,
    assistant_start: int | None = None,
    structure: Structure = NO_STRUCTURE,
) -> list[Mismatch]:
    """Compare an output with greedy choices from logits made elsewhere.

    Args:
        logits_of: gives float `[T, vocabulary]` for T tokens and their evictions, as
            `masked_logits` does for one model.
    """
    tokens = [*prompt, *output]
    start = section_start_of(list(prompt), config, markers, assistant_start)
    machine = BlockMachine(markers, config, section_start=start)
    machine.feed_all(prompt)
    allowed = []
    for index in range(len(prompt), len(tokens)):
        allowed.append(permitted(machine, index, config, markers, structure))
        machine.feed_all([tokens[index]], start=index)
    logits = logits_of(tokens, machine.evictions)
    special = special_tokens(markers, structure)
    wrong = []
    for index, may in enumerate(allowed, len(prompt)):
        row = constrained(logits[index - 1], may, special)
        expected = int(row.argmax())
        if tokens[index] != expected:
            gap = float(row[expected] - row[tokens[index]])
            wrong.append(Mismatch(index, tokens[index], expected, gap))
    return wrong
