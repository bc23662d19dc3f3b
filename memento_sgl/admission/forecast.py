"""What running requests will hold: the arithmetic of admission that foresees evictions.

    rows of one request    prompt  /|  /|  /|        rises by one a step, falls by `gone`
                                 /  |/  |/  |/       every `cycle` steps
    together, over time    the sum; the pool has to hold its highest point

SGLang reserves every token that a request may still write. Here each request is drawn ahead, step
by step, as far as SGLang's own estimate of its length reaches; the sum's peak is what is reserved.
`docs/admission.md` explains the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEPS_PER_CYCLE = 8
MOST_STEPS = 256
DEVIATIONS = 2.0


class BlockStats:
    """How requests of this server write blocks: running means over the last finished ones.

    Attributes:
        count: blocks seen.
        cycle: tokens from one closed memento to the next.
        gone: of these, the tokens that leave the row.
        deviation: standard deviation of `cycle`. The first block counts as one that was off by its
            whole length, so that few blocks are trusted little.
    """

    MEMORY = 256

    def __init__(self) -> None:
        self.count = 0
        self.cycle = 0.0
        self.gone = 0.0
        self._variance = 0.0

    @property
    def deviation(self) -> float:
        return float(self._variance**0.5)

    def learn(self, cycle: int, gone: int) -> None:
        """Take a finished block of `cycle` tokens in all, `gone` of which can be evicted."""
        self.count += 1
        if self.count == 1:
            self.cycle, self.gone, self._variance = float(cycle), float(gone), float(cycle) ** 2
            return
        weight = 1 / min(self.count, self.MEMORY)
        off = cycle - self.cycle
        self.cycle += weight * off
        self.gone += weight * (gone - self.gone)
        self._variance = (1 - weight) * (self._variance + weight * off**2)


class Retry:
    """When an eviction is a reason to ask again whether another request fits.

    Evictions that were foreseen change nothing about what fits, and asking costs a forecast and a
    match in the radix tree. It pays where much was learned since, and now and then. SGLang itself
    asks again when a request ends.
    """

    STEPS = 16

    def __init__(self) -> None:
        self._steps = self.STEPS
        self._blocks = 0

    def step(self) -> None:
        """A decode step is prepared."""
        self._steps += 1

    def due(self, blocks: int) -> bool:
        """Whether to ask now that a block was evicted; `blocks`: how many `BlockStats` has seen."""
        if self._steps < self.STEPS and blocks < 2 * self._blocks:
            return False
        self._steps, self._blocks = 0, blocks
        return True


class Estimate(NamedTuple):
    """What is expected of one request from now on. Units: tokens; one step writes one token.

    Attributes:
        ahead: tokens it is expected to write.
        cycle: tokens from one closed memento to the next; 0: it evicts nothing.
        gone: of these, the tokens that leave the row.
        opened: tokens since its last memento closed.
        kept: mementos that close before the first block goes.
        need: slots it takes before it writes: the rest of its prompt.
        peak_need: the most slots that its prefill takes at once.
        frees: slots that are free again once it has written `ahead` tokens; None: it may go on.
    """

    ahead: float
    cycle: float = 0.0
    gone: float = 0.0
    opened: int = 0
    kept: int = 0
    need: int = 0
    peak_need: int = 0
    frees: int | None = None


def tokens_ahead(
    left: int, expected: float, *, cycle: float = 0.0, opened: int = 0, certain: bool = False
) -> float:
    """How far a request is drawn ahead.

    As far as SGLang expects it to go (`expected`, which it lowers while memory lasts), but not less
    than to the end of the open block; to its very end if that is `certain` (`ignore_eos`).
    """
    if certain:
        return left
    return max(expected, min(left, until_closed(cycle, opened)))


def until_closed(cycle: float, opened: float) -> float:
    """Steps until the open block's memento closes. One that is late takes as long again as it is
    late, so a request that writes no blocks is soon taken for one."""
    return abs(cycle - opened)


class Forecast:
    """Slots that a set of requests takes beyond those it holds now, over the coming steps."""

    def __init__(self, estimates: Sequence[Estimate], deviation: float = 0.0) -> None:
        self._estimates = list(estimates)
        self._deviation = deviation
        self._draw(max((e.ahead for e in self._estimates), default=0.0))

    def _draw(self, horizon: float) -> None:
        cycles = [e.cycle for e in self._estimates if e.cycle]
        finest = min(cycles, default=horizon * STEPS_PER_CYCLE) / STEPS_PER_CYCLE
        self._width = max(finest, horizon / MOST_STEPS, 1.0)
        self._horizon = horizon
        count = int(np.ceil(horizon / self._width)) + 1
        self._steps = np.minimum(np.arange(count) * self._width, horizon)
        self._evicting = len(cycles)
        self._sum = _curves(self._estimates, self._steps, self._width).sum(axis=0)

    @property
    def peak(self) -> float:
        """Slots to be reserved; what single blocks deviate evens out in a large batch."""
        return self._peak(self._sum, self._evicting)

    def peak_with(self, estimate: Estimate) -> float:
        """The peak if one more request came in."""
        if estimate.ahead > self._horizon:
            self._draw(estimate.ahead)
        curve = _curves([estimate], self._steps, self._width)[0]
        return self._peak(self._sum + curve, self._evicting + bool(estimate.cycle))

    def add(self, estimate: Estimate) -> None:
        """One more request came in."""
        self._estimates.append(estimate)
        if estimate.ahead > self._horizon:
            self._draw(estimate.ahead)
            return
        self._sum = self._sum + _curves([estimate], self._steps, self._width)[0]
        self._evicting += bool(estimate.cycle)

    def _peak(self, growth: NDArray[np.float64], evicting: int) -> float:
        margin = DEVIATIONS * self._deviation * evicting**0.5
        return float(max(growth.max(initial=0.0), 0.0) + margin)


def _curves(
    estimates: Sequence[Estimate], steps: NDArray[np.float64], width: float
) -> NDArray[np.float64]:
    """Slots taken by each request at each step; float `[len(estimates), len(steps)]`.

    What shrinks a curve, the end of a block and of a request, counts `width` steps late: a
    peak between two steps is not missed.
    """
    if not estimates:
        return np.zeros((0, len(steps)))
    rows = np.array(estimates, dtype=np.float64)  # None becomes NaN
    ahead, cycle, gone, opened, kept, need, peak_need, frees = (c[:, None] for c in rows.T)
    written = np.minimum(steps, ahead)
    period = np.where(cycle > 0, cycle, np.inf)
    late = written - width - until_closed(cycle, opened)
    closed = np.maximum(np.floor(late / period) + 1, 0) - kept
    growth = need + written - np.where(cycle > 0, gone * np.maximum(closed, 0), 0.0)
    growth[:, :1] = np.maximum(growth[:, :1], peak_need)
    over = ~np.isnan(frees) & (steps >= ahead + width)
    return np.where(over, need - frees, growth)
