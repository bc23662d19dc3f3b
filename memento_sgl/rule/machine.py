"""The rule: which tokens form blocks and mementos, and which span goes when.

    logical index   0 .. prompt .. bs [ block ] be  ss [ memento ] se=p ...
    evicted span                      [s,      e)                   ^ eviction point p

Plain Python on ints: the runtime, the reference mask, the simulator and the training data all
use this one implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from enum import IntEnum
from typing import NamedTuple

from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import MarkerIds, TokenClass


class State(IntEnum):
    OUTSIDE = 0
    BLOCK = 1
    CLOSED = 2  # a block is complete, its memento has not begun
    MEMENTO = 3
    NO_SECTION = 4  # not inside an assistant turn
    ROLE = 5  # directly after <|im_start|>


class Phase(IntEnum):
    """How far an assistant turn is: a thought opens with `<think>` or its first block."""

    BEFORE = 0
    THOUGHT = 1
    ANSWER = 2


def _transitions() -> tuple[tuple[State, ...], ...]:
    table = {state: {cls: state for cls in TokenClass} for state in State}
    for state in (State.OUTSIDE, State.BLOCK, State.CLOSED, State.MEMENTO):
        table[state] |= {
            TokenClass.BLOCK_START: State.BLOCK,
            TokenClass.IM_START: State.ROLE,
            TokenClass.IM_END: State.NO_SECTION,
            TokenClass.SECTION: State.OUTSIDE,
        }
    table[State.BLOCK][TokenClass.BLOCK_END] = State.CLOSED
    table[State.CLOSED][TokenClass.SUMMARY_START] = State.MEMENTO
    table[State.MEMENTO][TokenClass.SUMMARY_END] = State.OUTSIDE
    table[State.NO_SECTION] |= {
        TokenClass.IM_START: State.ROLE,
        TokenClass.SECTION: State.OUTSIDE,
    }
    table[State.ROLE] = {cls: State.NO_SECTION for cls in TokenClass} | {
        TokenClass.ROLE_NAME: State.ROLE,
        TokenClass.ASSISTANT: State.OUTSIDE,
        TokenClass.IM_START: State.ROLE,
        TokenClass.SECTION: State.OUTSIDE,
    }
    return tuple(tuple(table[state][cls] for cls in TokenClass) for state in State)


TRANSITIONS = _transitions()
"""`TRANSITIONS[state][token_class]` is the next state; what is not a marker's turn is ignored.

ROLE_NAME and ASSISTANT are the classes of a token that comes where the name has it."""


class Block(NamedTuple):
    """One complete block with its memento: logical indices of the four markers."""

    start: int
    end: int
    summary_start: int
    summary_end: int

    @property
    def block_tokens(self) -> int:
        return self.end - self.start - 1

    @property
    def summary_tokens(self) -> int:
        return self.summary_end - self.summary_start - 1


class Eviction(NamedTuple):
    """KV of logical indices `[start, end)` is gone for every query at or after `point`.

    `resume` is the first index whose KV is computed (again) after the span has gone: `point`
    itself, or the memento's first token in restart mode.
    """

    point: int
    start: int
    end: int
    resume: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class BlockMachine:
    """Follows one request's logical tokens and tells which spans are due.

    Args:
        markers: token ids of the markers.
        config: options with `mask_delimiters` settled (not "auto").
        section_start: logical index from which markers count without chat markup having opened
            an assistant section; None when only the markup decides.

    Only tokens in `classes` need to be fed; all others leave the machine as it is. `phase` and
    `blocks_before` (blocks of earlier thoughts) matter to constrained emission only.
    """

    def __init__(
        self, markers: MarkerIds, config: MementoConfig, *, section_start: int | None = None
    ) -> None:
        if config.mask_delimiters == "auto":
            raise ConfigError("mask_delimiters must be true or false here: see for_family()")
        self.config = config
        self.markers = markers
        self.classes = markers.classes
        if not config.require_assistant_section:
            for token in (*markers.header, *markers.section_starts, *markers.section_ends):
                self.classes.pop(token, None)
            self.classes.pop(markers.im_end, None)  # type: ignore[arg-type]
        tracked = config.require_assistant_section or section_start is not None
        self.state = State.NO_SECTION if tracked else State.OUTSIDE
        self._section_start = section_start
        self.phase = Phase.BEFORE
        self.blocks_before = 0
        self.blocks: list[Block] = []
        self.evictions: list[Eviction] = []
        self._waiting: Block | None = None  # keep_last_block_for_answer
        self._entered = -1  # index at which `state` was entered
        self._read = 0  # tokens of the role's name that were read, in ROLE
        self._name = markers.name
        self._block: tuple[int, int] = (-1, -1)

    def copy(self) -> BlockMachine:
        """An equal machine that goes its own way."""
        other = copy(self)
        other.blocks, other.evictions = self.blocks.copy(), self.evictions.copy()
        return other

    def feed(self, index: int, token: int) -> Eviction | None:
        """Take the token at logical `index`; indices must rise. Returns the span now due."""
        if self._section_start is not None and index < self._section_start:
            return None
        cls = self.classes.get(token, TokenClass.OTHER)
        before = self.state_before(index)
        if before is State.ROLE:
            cls = self._in_role(token, cls)
        self.state = after = TRANSITIONS[before][cls]
        due: Eviction | None = None
        if cls is TokenClass.THINK_START or cls is TokenClass.THINK_END:
            self._think(index, cls, before)
        if after is State.BLOCK and cls is TokenClass.BLOCK_START:
            self._block = (index, -1)
            if self.phase is Phase.BEFORE:
                self._open_thought()
            if self._waiting is not None:
                due = self._evict(self._waiting, index)
                self._waiting = None
        elif cls is TokenClass.SECTION:
            self.phase = Phase.BEFORE
        elif after is before and cls is not TokenClass.IM_START:
            return None
        elif after is State.CLOSED:
            self._block = (self._block[0], index)
        elif before is State.ROLE and after is State.OUTSIDE:
            self.phase = Phase.BEFORE
        elif before is State.MEMENTO and cls is TokenClass.SUMMARY_END:
            due = self._close(Block(*self._block, self._entered, index))
        self._entered, self._read = index, 0
        return due

    def feed_all(self, tokens: Iterable[int], start: int = 0) -> list[Eviction]:
        """Feed consecutive tokens, the first one at logical index `start`."""
        due = []
        watching = self.classes.keys()
        for index, token in enumerate(tokens, start):
            if token in watching and (eviction := self.feed(index, token)) is not None:
                due.append(eviction)
        return due

    def state_before(self, index: int) -> State:
        """The state in which the token at `index` will be read (given all class tokens so far)."""
        if self._section_start is not None and index >= self._section_start:
            self._section_start = None
            self.state, self._entered = State.OUTSIDE, index - 1
            self.phase = Phase.BEFORE
        if self.state is State.ROLE and index != self._entered + 1 + self._read:
            self.state = State.NO_SECTION
        return self.state

    def held(self, index: int) -> int:
        """Tokens before `index` since the state was entered: those of an open block or memento."""
        self.state_before(index)
        return index - self._entered - 1

    def _in_role(self, token: int, cls: TokenClass) -> TokenClass:
        """The class of a token where the role's name stands."""
        if token == self._name[self._read]:
            self._read += 1
            whole = self._read == len(self._name)
            return TokenClass.ASSISTANT if whole else TokenClass.ROLE_NAME
        name = (TokenClass.ASSISTANT, TokenClass.ROLE_NAME)
        return TokenClass.OTHER if cls in name else cls

    def _think(self, index: int, cls: TokenClass, before: State) -> None:
        if before in (State.NO_SECTION, State.ROLE):
            return
        if cls is TokenClass.THINK_END:
            self.phase = Phase.ANSWER
        elif self.phase is Phase.BEFORE:
            self._open_thought()
        if before is State.OUTSIDE:
            self._entered = index

    def _open_thought(self) -> None:
        self.phase = Phase.THOUGHT
        self.blocks_before = len(self.blocks)

    def _close(self, block: Block) -> Eviction | None:
        self.blocks.append(block)
        keep = self.config.keep_last_n_blocks
        if not self.config.evicts or len(self.blocks) <= keep:
            return None
        if self.config.keep_last_block_for_answer:
            self._waiting = block
            return None
        return self._evict(self.blocks[-1 - keep], block.summary_end)

    def _evict(self, block: Block, point: int) -> Eviction | None:
        if block.block_tokens == 0:
            return None
        if self.config.mask_delimiters or self.config.restart_mode:
            start, end = block.start, block.end + 1
        else:
            start, end = block.start + 1, block.end
        resume = block.summary_start if self.config.restart_mode else point
        eviction = Eviction(point, start, end, resume)
        self.evictions.append(eviction)
        return eviction


def section_start_of(
    prompt: Sequence[int], config: MementoConfig, markers: MarkerIds, assistant_start: int | None
) -> int | None:
    """Where markers begin to count: what the request said, else the end of a prompt without chat
    markup, else None (the markup decides, or everything counts)."""
    if assistant_start is not None:
        return assistant_start
    if not config.require_assistant_section or markers.in_chat(prompt):
        return None
    return len(prompt)


def replay(
    tokens: list[int],
    prompt_len: int,
    markers: MarkerIds,
    config: MementoConfig,
    *,
    assistant_start: int | None = None,
) -> BlockMachine:
    """Run the rule over prompt + output from scratch, as the engine does token by token."""
    start = section_start_of(tokens[:prompt_len], config, markers, assistant_start)
    machine = BlockMachine(markers, config, section_start=start)
    machine.feed_all(tokens)
    return machine
