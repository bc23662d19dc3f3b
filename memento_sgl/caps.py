"""Length caps as a table automaton on the device, so that sampling never waits for the CPU.

Per request slot: the machine's state and how many tokens the open block or memento holds. The
table is the machine's own (`machine.TRANSITIONS`); the CPU machine loads the state whenever a
request is prefilled or a step is redone, so a voided step leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from memento_sgl.machine import TRANSITIONS, State
from memento_sgl.markers import MarkerIds, TokenClass

if TYPE_CHECKING:
    from memento_sgl.request import RequestState


class CapAutomaton:
    """Forces `<|block_end|>` and `<|summary_end|>` where a block or memento reached its cap.

    Args:
        slots: rows of the request table.
        vocabulary: columns of the logits.
        markers: token ids; chat markers may be None.
        device: where sampling happens.
    """

    def __init__(
        self, slots: int, vocabulary: int, markers: MarkerIds, device: torch.device | str
    ) -> None:
        self._next = torch.tensor(TRANSITIONS, dtype=torch.int64, device=device)
        self._classes = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        for token, cls in markers.classes.items():
            self._classes[token] = int(cls)
        self._ends = torch.zeros(len(State), dtype=torch.int64, device=device)
        self._ends[State.BLOCK] = markers.block_end
        self._ends[State.MEMENTO] = markers.summary_end
        self._state = torch.zeros(slots, dtype=torch.int64, device=device)
        self._held = torch.zeros(slots, dtype=torch.int64, device=device)
        # Cap by slot and machine state; 0: none.
        self._caps = torch.zeros(slots, len(State), dtype=torch.int64, device=device)

    def load(self, slots: Sequence[int], states: Sequence[RequestState]) -> None:
        """Take over from the CPU machine: the next token sampled in a slot comes at `length`."""
        rows = [
            (
                slot,
                int(state.machine.state_before(state.length)),
                state.machine.content_tokens(state.length),
                *state.config.caps,
            )
            for slot, state in zip(slots, states, strict=True)
        ]
        values = torch.tensor(rows, dtype=torch.int64).to(self._state.device, non_blocking=True)
        where, state_, held, block, memento = values.unbind(1)
        self._state[where] = state_
        self._held[where] = held
        self._caps[where, State.BLOCK] = block
        self._caps[where, State.MEMENTO] = memento

    def constrain(self, slots: torch.Tensor, logits: torch.Tensor) -> None:
        """Leave only the closing marker possible where a cap is reached.

        Args:
            slots: request slots of the batch; int64 `[B]`.
            logits: next-token logits, changed in place; float `[B, V]`.
        """
        state = self._state[slots]
        cap = self._caps[slots, state]
        forced = (cap > 0) & (self._held[slots] >= cap)
        end = self._ends[state].unsqueeze(1)
        kept = logits.gather(1, end)
        logits.masked_fill_(forced.unsqueeze(1), float("-inf"))
        logits.scatter_(1, end, torch.where(forced.unsqueeze(1), torch.zeros_like(kept), kept))

    def advance(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Follow the sampled tokens; int64 `[B]` each."""
        before = self._state[slots]
        cls = self._classes[tokens.to(torch.int64)]
        after = self._next[before, cls]
        opened = (after != before) | (cls == TokenClass.BLOCK_START)
        self._held[slots] = torch.where(opened, 0, self._held[slots] + 1)
        self._state[slots] = after
