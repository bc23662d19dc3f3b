"""What a model has learned of the form: loss, markers and memento lengths on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from memento_sgl.offline.masks import IGNORED, mask_fields, sdpa_mask_of
from memento_sgl.training.rows import Stage, TrainingRow

MEMENTOS = 8
LONGEST = 4
"""A memento that is not closed by this multiple of the row's own length counts with it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """On held-out rows, under the stage's mask.

    Attributes:
        loss: mean over learned tokens, in nats.
        marker_accuracy: share of markers that are the most likely token where they stand.
        memento_ratio: tokens of a greedily written memento, as a multiple of the row's own; mean.
        mementos_closed: share of those that ended by themselves.
    """

    rows: int
    loss: float
    marker_accuracy: float
    memento_ratio: float
    mementos_closed: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: Any, rows: Sequence[TrainingRow], stage: Stage, markers: Sequence[int]
) -> Measured:
    """Measure a Hugging Face model with `attn_implementation="sdpa"`.

    Args:
        markers: ids of block start and end, memento start and end, in this order.
    """
    model.eval()
    with torch.no_grad():
        return _measure(model, rows, stage, markers)


def _measure(
    model: Any, rows: Sequence[TrainingRow], stage: Stage, markers: Sequence[int]
) -> Measured:
    loss = learned = right = marked = 0.0
    for row in rows:
        logits = _logits(model, row, stage)[:-1].float()
        labels = torch.tensor([IGNORED, *row.labels[1:]], device=logits.device)[1:]
        loss += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        learned += int((labels != IGNORED).sum())
        where = torch.isin(labels, torch.tensor(list(markers), device=labels.device))
        right += int((logits.argmax(-1) == labels)[where].sum())
        marked += int(where.sum())
    written = [
        _write_memento(model, row, stage, span, markers[3])
        for row in rows
        for span in row.memento_spans
        if span[1] > span[0]
    ][:MEMENTOS]
    return Measured(
        rows=len(rows),
        loss=loss / learned,
        marker_accuracy=right / marked,
        memento_ratio=sum(length / own for length, own, _ in written) / max(len(written), 1),
        mementos_closed=sum(closed for *_, closed in written) / max(len(written), 1),
    )


def _logits(model: Any, row: TrainingRow, stage: Stage) -> torch.Tensor:
    fields = mask_fields(row.evictions if stage == "memento" else [], len(row.input_ids))
    hidden_from = torch.from_numpy(fields.hidden_from).to(model.device)
    out = model(
        input_ids=torch.tensor([row.input_ids], device=model.device),
        position_ids=torch.arange(len(row.input_ids), device=model.device)[None],
        attention_mask=sdpa_mask_of(hidden_from),
        use_cache=False,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def _write_memento(
    model: Any, row: TrainingRow, stage: Stage, span: Sequence[int], closes: int
) -> tuple[int, int, bool]:
    """Tokens written greedily after the row's own `<|summary_start|>`, tokens of the row's memento,
    and whether it was closed. Nothing is evicted inside a memento, so its queries see the same."""
    begin, end = span
    evictions = [e for e in row.evictions if e[0] < begin] if stage == "memento" else []
    fields = mask_fields(evictions, begin)
    hidden_from = torch.from_numpy(fields.hidden_from).to(model.device)
    kept = hidden_from == begin
    out = model(
        input_ids=torch.tensor([row.input_ids[:begin]], device=model.device),
        position_ids=torch.arange(begin, device=model.device)[None],
        attention_mask=sdpa_mask_of(hidden_from),
        use_cache=True,
    )
    most = LONGEST * (end - begin)
    for written in range(most):
        token = int(out.logits[0, -1].argmax())
        if token == closes:
            return written, end - begin, True
        seen = torch.cat([kept, kept.new_ones(written + 1)])
        out = model(
            input_ids=torch.tensor([[token]], device=model.device),
            position_ids=torch.tensor([[begin + written]], device=model.device),
            attention_mask=seen[None, None, None],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return most, end - begin, False
