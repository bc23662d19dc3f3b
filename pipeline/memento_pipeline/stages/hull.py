"""Parametric dynamic programming behind `segment`: all block counts at once.

One pass with slope `a` finds, for every block count K, the partition that maximises S - a*Q. Its
point (S, Q) is a vertex of K's hull, and its line bounds all partitions with K blocks:

    S                 . <- apex: f there bounds everything between two known lines
      ______________./
      line a=0     / line a       Q ->

Between two neighbouring lines the unknown hull lies below their apex, and f is convex, so f(apex)
bounds the gap. The gap with the best bound is split next; when no bound beats the best partition
found, that partition is optimal.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TOLERANCE = 1e-11
_ROUNDS = 10_000


class Line(NamedTuple):
    """S <= height + slope * Q for all partitions of one K; the point lies on it (NaN: unknown)."""

    slope: float
    height: float
    scores: float
    squares: float


class Gap(NamedTuple):
    """`bound` on f between two lines of K `blocks`, and the slope to solve there."""

    bound: float
    blocks: int
    slope: float


class Search:
    """One search; `run` returns the cut boundaries, or None when the limits cannot be kept.

    Args:
        sizes: tokens per unit, shape (n,).
        scores: score per boundary between units, shape (n - 1,).
        minimum, maximum: tokens per block.
        penalty: weight of std/mean.
    """

    def __init__(
        self, sizes: Ints, scores: Floats, minimum: int, maximum: float, penalty: float
    ) -> None:
        self.count = len(sizes)
        self.edges = np.concatenate([[0], np.cumsum(sizes)]).astype(np.float64)
        self.total = float(self.edges[-1])
        self.gain = np.concatenate([[0.0], scores, [0.0]])  # of a block that starts at an edge
        self.minimum, self.maximum, self.penalty = float(minimum), maximum, penalty
        self.best = -inf
        self.best_cuts: list[int] | None = None
        self.lines: dict[int, list[Line]] = {}

    def run(self) -> list[int] | None:
        most = self.count
        if self.minimum > 0:
            most = min(most, max(1, int(self.total // self.minimum)))
        if self.minimum <= self.total <= self.maximum:
            self._offer([0, self.count])
        for blocks, line in self._upper_lines(most).items():
            self.lines[blocks] = [line]
        self.first, self.last = self._window()
        for _ in range(_ROUNDS):
            gap = self._widest_gap()
            if gap is None:
                return self.best_cuts
            self._solve(gap.slope)
        raise AssertionError("the hull search did not end")

    def value(self, blocks: int, scores: float, squares: float) -> float:
        spread = blocks * squares / (self.total * self.total) - 1.0
        return scores / blocks - self.penalty * sqrt(max(spread, 0.0))

    def _offer(self, bounds: list[int]) -> None:
        """Keep the partition with these edges if it is the best so far."""
        sizes = np.diff(self.edges[bounds])
        value = self.value(len(sizes), float(self.gain[bounds[1:-1]].sum()), float(sizes @ sizes))
        if value > self.best:
            self.best, self.best_cuts = value, [edge - 1 for edge in bounds[1:-1]]

    def _window(self) -> tuple[Ints, Ints]:
        """For every edge j, the first and last edge i at which a block [i, j) may start."""
        first = np.searchsorted(self.edges, self.edges - self.maximum, side="left")
        last = np.searchsorted(self.edges, self.edges - self.minimum, side="right")
        return first, np.minimum(last, np.arange(self.count + 1)) - 1  # blocks are not empty

    def _upper_lines(self, most: int) -> dict[int, Line]:
        """The a=0 line of every K without the upper size limit: one running maximum per K."""
        last = self._window()[1]
        layer = np.full(self.count + 1, -inf)
        layer[0] = 0.0
        lines = {}
        for blocks in range(1, most + 1):
            running = np.maximum.accumulate(layer + self.gain)
            layer = np.where(last >= 0, running[np.maximum(last, 0)], -inf)
            if layer[-1] > -inf:
                lines[blocks] = Line(0.0, float(layer[-1]), np.nan, np.nan)
        return lines

    def _gaps(self, blocks: int) -> list[Gap]:
        """The gaps of K whose bound is not known to be one of their own ends."""
        lines = self.lines[blocks]
        least = self.total * self.total / blocks  # Q of equal blocks
        gaps = []
        for low, high in pairwise(lines):
            if np.isnan(low.squares):
                slope = low.slope  # known as a bound only: solve this slope itself
            elif low.squares > high.squares:
                slope = (low.scores - high.scores) / (low.squares - high.squares)
                if not low.slope < slope < high.slope:
                    continue  # a line passes through both points: an edge of the hull
            else:
                continue  # one point is the maximum at both slopes
            squares = max((low.height - high.height) / (high.slope - low.slope), least)
            top = low.height + low.slope * squares
            gaps.append(Gap(self.value(blocks, top, squares), blocks, slope))
        steep = self.penalty * blocks * blocks / (0.3 * self.total * self.total)
        last = lines[-1]
        top = last.height + last.slope * least
        slope = max(steep or 1.0 / (self.total * self.total), 4 * last.slope)
        gaps.append(Gap(self.value(blocks, top, least), blocks, slope))
        return gaps

    def _widest_gap(self) -> Gap | None:
        """The gap to look into next; drops every K that cannot win any more."""
        widest: Gap | None = None
        for blocks in list(self.lines):
            gap = max(self._gaps(blocks))
            if gap.bound <= self.best + _TOLERANCE:
                del self.lines[blocks]
            elif widest is None or gap > widest:
                widest = gap
        return widest

    def _solve(self, slope: float) -> None:
        """One pass at this slope for every K that is still open: new lines, new partitions.

        -slope * size**2 is supermodular in a block's two edges and the windows rise, so the best
        start rises with the end. It is searched in full for every `stride`-th edge only; in between
        the neighbours bound it.
        """
        edges, rows = self.edges, np.arange(self.count + 1)
        stride = int(sqrt(len(rows))) + 1
        pivots = rows[::stride]
        allowed = (rows >= self.first[pivots, None]) & (rows <= self.last[pivots, None])
        gaps = edges[pivots, None] - edges
        weight = np.where(allowed, self.gain - slope * gaps * gaps, -inf)
        layer = np.full(self.count + 1, -inf)
        layer[0] = 0.0
        came: list[Ints] = []
        for blocks in range(1, max(self.lines) + 1):
            options = weight + layer
            pick = options.argmax(axis=1)
            reached = options[np.arange(len(pivots)), pick] > -inf
            least = np.maximum.accumulate(np.where(reached, pick, 0))
            most = np.where(reached, pick, self.count)
            most = np.minimum.accumulate(most[::-1])[::-1]
            begin = int(np.searchsorted(edges, blocks * self.minimum))
            ends = rows[begin:]
            group = ends // stride
            low = np.maximum(least[group], self.first[begin:])
            low = np.maximum(low, np.searchsorted(edges, (blocks - 1) * self.minimum))
            high = np.minimum(np.append(most[1:], self.count)[group], self.last[begin:])
            index = low[:, None] + np.arange(max(int((high - low).max()), 0) + 1)
            inside = index <= high[:, None]
            np.minimum(index, self.count, out=index)
            sizes = edges[begin:, None] - edges[index]
            options = np.where(inside, (layer + self.gain)[index] - slope * sizes * sizes, -inf)
            pick = options.argmax(axis=1)
            layer = np.full(self.count + 1, -inf)
            layer[begin:] = options[np.arange(len(ends)), pick]
            start = np.zeros(self.count + 1, dtype=np.int64)
            start[begin:] = index[np.arange(len(ends)), pick]
            came.append(start)
            if blocks in self.lines:
                self._learn(blocks, slope, float(layer[-1]), came)

    def _learn(self, blocks: int, slope: float, height: float, came: list[Ints]) -> None:
        if height == -inf:  # no partition of the useful kind
            del self.lines[blocks]
            return
        bounds = [self.count]
        for layer in reversed(came):
            bounds.append(int(layer[bounds[-1]]))
        bounds.reverse()
        self._offer(bounds)
        sizes = np.diff(self.edges[bounds])
        point = float(self.gain[bounds[1:-1]].sum()), float(sizes @ sizes)
        lines = [line for line in self.lines[blocks] if line.slope != slope]
        self.lines[blocks] = sorted([*lines, Line(slope, height, *point)])
