"""What happens to a request's blocks, by name: the machine's transitions as they are read.

Plain Python on ints, like the machine itself; metrics, traces and debug lines all use this.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from memento_sgl.rule.machine import BlockMachine, Eviction, Phase, State
from memento_sgl.rule.markers import TokenClass

Kind = Literal[
    "think", "block_open", "block_close", "memento_open", "memento_close", "abandon", "answer"
]


class BlockEvent(NamedTuple):
    """`at` is the logical index of the marker; `tokens` those since the marker before it, where
    a block or memento was closed or abandoned, else None."""

    kind: Kind
    at: int
    tokens: int | None = None


_INSIDE = (State.BLOCK, State.CLOSED, State.MEMENTO)
_STEPS: dict[tuple[State, State], Kind] = {
    (State.BLOCK, State.CLOSED): "block_close",
    (State.CLOSED, State.MEMENTO): "memento_open",
    (State.MEMENTO, State.OUTSIDE): "memento_close",
}


def read_marker(
    machine: BlockMachine, index: int, token: int
) -> tuple[list[BlockEvent], Eviction | None]:
    """Feed one token to the machine; what that meant, and the span now due."""
    before, held, phase = machine.state_before(index), machine.held(index), machine.phase
    due = machine.feed(index, token)
    after = machine.state
    opened = after is State.BLOCK and machine.classes[token] is TokenClass.BLOCK_START
    section = after is State.OUTSIDE and machine.classes[token] is TokenClass.SECTION
    events = []
    if before in _INSIDE and (opened or section or after in (State.NO_SECTION, State.ROLE)):
        events.append(BlockEvent("abandon", index, held))
    if machine.phase is not phase and machine.phase is not Phase.BEFORE:
        events.append(BlockEvent("think" if machine.phase is Phase.THOUGHT else "answer", index))
    if opened:
        events.append(BlockEvent("block_open", index))
    elif not section and (step := _STEPS.get((before, after))) is not None:
        events.append(BlockEvent(step, index, None if step == "memento_open" else held))
    return events, due
