"""Constrained emission as a table automaton on the device: sampling never waits for the CPU.

Per request slot: state, tokens held by the open block or memento, blocks of the thought, and
bounds. The tables are those of `emission.py`. The CPU machine loads a slot whenever its request is
prefilled or a step is done again, so voided steps and retractions leave no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from memento_sgl.engine.staging import staged
from memento_sgl.rule.emission import (
    MOVES,
    SEPARATORS,
    TEXT,
    Emit,
    Structure,
    bounds,
    limits_of,
    need,
    situation,
    special_tokens,
)
from memento_sgl.rule.markers import MarkerIds, TokenClass

if TYPE_CHECKING:
    from memento_sgl.request.state import RequestState


class EmissionAutomaton:
    """Leaves only those tokens possible that each request's `constrain` option permits.

    Args:
        slots: rows of the request table.
        vocabulary: columns of the logits.
        markers: token ids; those of chat markup and thoughts may be None.
        structure: end-of-sequence and white space tokens.
        device: where sampling happens.
    """

    def __init__(
        self,
        slots: int,
        vocabulary: int,
        markers: MarkerIds,
        structure: Structure,
        device: torch.device | str,
    ) -> None:
        def table(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        special = special_tokens(markers, structure)
        self._special = table(special)  # [K]
        self._needs = table([[need(s, t, markers, structure) for t in special] for s in Emit])
        self._text = table([s in TEXT for s in Emit], torch.bool)
        self._next = table(MOVES)  # [states, classes]
        self._classes = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        for token, cls in markers.classes.items():
            self._classes[token] = int(cls)
        # A role's name of several tokens is followed by their order, not by their classes.
        self._name = table(markers.name) if markers.role_name else None
        if self._name is not None:
            self._classes[self._name] = int(TokenClass.OTHER)
        # Columns: state, tokens held, blocks, fewest blocks, most blocks.
        self._now = torch.zeros(slots, 5, dtype=torch.int64, device=device)
        # By slot and state: fewest and most tokens of the open block or memento.
        self._bounds = torch.zeros(slots, len(Emit), 2, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """No slot is constrained, whatever it held."""
        self._now.zero_()
        self._bounds.zero_()

    def load(self, slots: Sequence[int], states: Sequence[RequestState]) -> None:
        """Take over from the CPU machine: the next token sampled in a slot comes at `length`."""
        rows, spans = [], []
        for state in states:
            limits = limits_of(state.config)
            here = situation(state.machine, state.length, state.config)
            rows.append([*here, limits.min_blocks, limits.max_blocks])
            spans.append([bounds(each, limits) for each in Emit])
        device = self._now.device
        where = staged(slots, device)
        self._now[where] = staged(rows, device)
        self._bounds[where] = staged(spans, device)

    def constrain(self, slots: torch.Tensor, logits: torch.Tensor) -> None:
        """Make impossible what may not come next.

        Args:
            slots: request slots of the batch; int64 `[B]`.
            logits: next-token logits, changed in place; float `[B, V]`.
        """
        state, held, blocks, fewest, most = self._now[slots].unbind(1)
        low, high = self._bounds[slots, state].unbind(1)
        room = (high == 0) | (held < high)
        met = torch.stack(  # in the order of `Need`
            [
                torch.zeros_like(room),
                room,
                held >= low,
                held < SEPARATORS,
                blocks >= fewest,
                (most == 0) | (blocks < most),
            ],
            dim=1,
        )
        allowed = met.gather(1, self._needs[state])
        kept = logits[:, self._special].masked_fill_(~allowed, float("-inf"))
        logits.masked_fill_(~(self._text[state] & room).unsqueeze(1), float("-inf"))
        logits[:, self._special] = kept

    def advance(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Follow the sampled tokens; int64 `[B]` each."""
        now = self._now[slots]
        before = now[:, 0]
        cls = self._classes[tokens.to(torch.int64)]
        if self._name is not None:
            cls = self._in_role(before, now[:, 1], tokens, cls, self._name)
        after = self._next[before, cls]
        opened = (after != before) | (cls == TokenClass.BLOCK_START)
        if self._name is not None:
            opened |= cls == TokenClass.IM_START
        now[:, 1] = torch.where(opened, 0, now[:, 1] + 1)
        now[:, 2] += (before == Emit.MEMENTO) & (after == Emit.THOUGHT)
        now[:, 0] = after
        self._now[slots] = now

    def _in_role(
        self,
        before: torch.Tensor,
        read: torch.Tensor,
        tokens: torch.Tensor,
        cls: torch.Tensor,
        name: torch.Tensor,
    ) -> torch.Tensor:
        """Classes with those of the tokens that go on with the name of a role; int64 `[B]` each,
        `name` `[tokens of the name]`. `read`: tokens of the name before this one."""
        place = read.clamp(max=len(name) - 1)
        hit = (before == Emit.FREE_ROLE) & (name[place] == tokens)
        found = torch.where(
            place == len(name) - 1, int(TokenClass.ASSISTANT), int(TokenClass.ROLE_NAME)
        )
        return torch.where(hit, found, cls)
