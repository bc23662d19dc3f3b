"""What a request may sample next, by its `constrain` option. Plain Python on ints.

    strict   START --<think>--> THOUGHT --<|block_start|>--> BLOCK --<|block_end|>--> CLOSED
                                 ^  |                                                  |
                       ANSWER <--+  +--<|summary_end|>-- MEMENTO <--<|summary_start|>--+
                          </think>

One table (`need`) says under which condition a token may follow a state. The automaton on the
device (`automaton.py`) and the reference both evaluate it. In the other modes the states are the
machine's own, and only a full block or memento forces its closing marker.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from memento_sgl.rule.config import Limits, MementoConfig
from memento_sgl.rule.machine import TRANSITIONS, BlockMachine, Phase, State
from memento_sgl.rule.markers import MarkerIds, TokenClass, Tokenizer

SEPARATORS = 2
"""White space tokens that strict emission allows in a row where only markers stand."""


class Emit(IntEnum):
    """States of emission: those of the machine, then those of strict emission."""

    FREE_OUTSIDE = State.OUTSIDE
    FREE_BLOCK = State.BLOCK
    FREE_CLOSED = State.CLOSED
    FREE_MEMENTO = State.MEMENTO
    FREE_NO_SECTION = State.NO_SECTION
    FREE_ROLE = State.ROLE
    START = 6
    THOUGHT = 7
    BLOCK = 8
    CLOSED = 9
    MEMENTO = 10
    ANSWER = 11


class Need(IntEnum):
    """Condition under which a token may be sampled in a state."""

    NEVER = 0
    ROOM = 1  # the open block or memento is not full
    CLOSING = 2  # it holds enough to be closed
    SEPARATOR = 3  # few separators so far
    ENOUGH_BLOCKS = 4
    MORE_BLOCKS = 5


class Structure(NamedTuple):
    """Token ids that matter to strict emission beside the markers."""

    ends: tuple[int, ...]  # end of sequence
    separators: tuple[int, ...]  # white space that may stand between the markers


NO_STRUCTURE = Structure((), ())
NO_LIMITS = Limits(0, 0, 0, 0, 0, 0)


class Situation(NamedTuple):
    """Where a request stands before its next token.

    Attributes:
        held: tokens since the state was entered.
        blocks: finished blocks of the thought.
    """

    state: Emit
    held: int
    blocks: int


CLOSERS = {
    Emit.FREE_BLOCK: TokenClass.BLOCK_END,
    Emit.FREE_MEMENTO: TokenClass.SUMMARY_END,
    Emit.BLOCK: TokenClass.BLOCK_END,
    Emit.MEMENTO: TokenClass.SUMMARY_END,
}
_STRICT = {
    State.BLOCK: Emit.BLOCK,
    State.CLOSED: Emit.CLOSED,
    State.MEMENTO: Emit.MEMENTO,
}
TEXT = frozenset(Emit) - {Emit.START, Emit.THOUGHT, Emit.CLOSED}
"""States in which ordinary tokens may be sampled."""

_MOVES = {
    (Emit.START, TokenClass.THINK_START): Emit.THOUGHT,
    (Emit.THOUGHT, TokenClass.BLOCK_START): Emit.BLOCK,
    (Emit.THOUGHT, TokenClass.THINK_END): Emit.ANSWER,
    (Emit.BLOCK, TokenClass.BLOCK_END): Emit.CLOSED,
    (Emit.CLOSED, TokenClass.SUMMARY_START): Emit.MEMENTO,
    (Emit.MEMENTO, TokenClass.SUMMARY_END): Emit.THOUGHT,
}
MOVES: tuple[tuple[int, ...], ...] = (
    *TRANSITIONS,
    *(
        tuple(_MOVES.get((state, cls), state) for cls in TokenClass)
        for state in list(Emit)[len(State) :]
    ),
)
"""`MOVES[state][token_class]` is the next state."""


def special_tokens(markers: MarkerIds, structure: Structure) -> list[int]:
    """The tokens that not every state allows, each once."""
    watched = markers._replace(assistant=None)[: TokenClass.THINK_END]
    found = [
        *(t for t in watched if isinstance(t, int)),
        *markers.section_starts,
        *markers.section_ends,
        *structure.ends,
        *structure.separators,
    ]
    return list(dict.fromkeys(found))


def need(state: Emit, token: int, markers: MarkerIds, structure: Structure) -> Need:
    """The condition for a special token in a state."""
    cls = markers.classes.get(token, TokenClass.OTHER)
    if state in CLOSERS and CLOSERS[state] is cls:
        return Need.CLOSING
    if state < Emit.START:
        return Need.ROOM
    if (state, cls) in _MOVES:
        opening = {
            TokenClass.BLOCK_START: Need.MORE_BLOCKS,
            TokenClass.THINK_END: Need.ENOUGH_BLOCKS,
        }
        return opening.get(cls, Need.ROOM)
    if token in structure.separators and cls is TokenClass.OTHER:
        if state in (Emit.THOUGHT, Emit.CLOSED):
            return Need.SEPARATOR
        return Need.ROOM if state in TEXT else Need.NEVER
    if token in structure.ends and state is Emit.ANSWER:
        return Need.ROOM
    return Need.NEVER


def situation(machine: BlockMachine, index: int, config: MementoConfig) -> Situation:
    """Where a request stands before the token at logical `index`.

    With strict emission an answer goes on behind the end of its turn (`ignore_eos`); a prompt that
    ends outside of an assistant turn is refused before it gets here.
    """
    state, held = machine.state_before(index), machine.held(index)
    if config.emission != "strict":
        return Situation(Emit(state), held, 0)
    blocks = len(machine.blocks) - machine.blocks_before
    if machine.phase is Phase.ANSWER:
        return Situation(Emit.ANSWER, held, blocks)
    if state in (State.NO_SECTION, State.ROLE):
        return Situation(Emit(state), held, 0)
    if state is State.OUTSIDE:
        begun = machine.phase is Phase.THOUGHT
        return Situation(Emit.THOUGHT if begun else Emit.START, held, blocks)
    return Situation(_STRICT[state], held, blocks)


def limits_of(config: MementoConfig) -> Limits:
    """The bounds in force."""
    return NO_LIMITS if config.emission == "off" else config.limits


def bounds(state: Emit, limits: Limits) -> tuple[int, int]:
    """Fewest and most tokens (0: no bound) that a block or memento in this state may hold."""
    if state in (Emit.FREE_BLOCK, Emit.BLOCK):
        return limits.min_block, limits.max_block
    if state in (Emit.FREE_MEMENTO, Emit.MEMENTO):
        return limits.min_summary, limits.max_summary
    return 0, 0


class Permitted(NamedTuple):
    """What may come next: `special` of the special tokens, and any other token if `text`."""

    text: bool
    special: frozenset[int]


def permitted(
    machine: BlockMachine,
    index: int,
    config: MementoConfig,
    markers: MarkerIds,
    structure: Structure,
) -> Permitted:
    """What may be sampled at logical `index`."""
    state, held, blocks = situation(machine, index, config)
    limits = limits_of(config)
    fewest, most = bounds(state, limits)
    met = (  # in the order of `Need`
        False,
        most == 0 or held < most,
        held >= fewest,
        held < SEPARATORS,
        blocks >= limits.min_blocks,
        limits.max_blocks == 0 or blocks < limits.max_blocks,
    )
    return _permitted(state, met, markers, structure)


@lru_cache(maxsize=1024)  # all states and conditions of a server
def _permitted(
    state: Emit, met: tuple[bool, ...], markers: MarkerIds, structure: Structure
) -> Permitted:
    special = special_tokens(markers, structure)
    allowed = frozenset(t for t in special if met[need(state, t, markers, structure)])
    return Permitted(state in TEXT and met[Need.ROOM], allowed)


def is_forced(
    machine: BlockMachine,
    index: int,
    config: MementoConfig,
    markers: MarkerIds,
    structure: Structure,
) -> bool:
    """Whether exactly one token may be sampled at logical `index`: always a marker."""
    text, special = permitted(machine, index, config, markers, structure)
    return not text and len(special) == 1


def resolve_structure(
    tokenizer: Tokenizer | None, ends: set[int], vocabulary: int | None = None
) -> Structure:
    """Find the separators of a tokenizer.

    Args:
        tokenizer: None if there is none: then there are no separators.
        ends: end-of-sequence ids of the model.
        vocabulary: token ids that the model has; what lies behind it is never sampled, and left
            out. None: not known here.
    """
    found = []
    if tokenizer is not None:
        for text in ("\n", "\n\n", " "):
            ids = list(tokenizer.encode(text, add_special_tokens=False))
            if len(ids) == 1:
                found.append(ids[0])
    if vocabulary is not None:
        ends = {token for token in ends if token < vocabulary}
        found = [token for token in found if token < vocabulary]
    return Structure(tuple(sorted(ends)), tuple(dict.fromkeys(found)))
