"""Where to cut: the exact maximum of the paper's objective (stage 4).

    f = (1/K) * sum(scores at the K-1 cuts) - penalty * std(sizes) / mean(sizes)

over all partitions of consecutive units into K blocks within the size limits, and over K. `std`
is the population standard deviation. With N tokens in all, S the sum of scores and Q the sum of
squared sizes, std/mean = sqrt(K*Q/N**2 - 1), so for fixed K

    f(S, Q) = S/K - penalty * sqrt(K*Q/N**2 - 1)

is convex, rises with S and falls with Q: its maximum over the reachable points is a vertex of their
hull, hence a maximiser of S - a*Q for some a >= 0. `_hull` finds it without trying every a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from memento_pipeline.records import (
    BoundaryScores,
    Segmentation,
    Sentences,
    Span,
    blocks_of,
)
from memento_pipeline.stages.hull import Search
from memento_sgl.errors import DataError


@dataclass(frozen=True)
class SegmentOptions:
    """Limits in tokens. `penalty` is the paper's lambda; `max_tokens` None: no upper limit.

    `strict_max`: refuse a trace whose units do not fit `max_tokens`, instead of raising the limit
    to the smallest that can be kept and saying so in `Segmentation.relaxed`.
    """

    min_tokens: int = 200
    max_tokens: int | None = None
    penalty: float = 0.5
    strict_max: bool = False

    def __post_init__(self) -> None:
        if self.min_tokens < 0 or not (self.penalty >= 0 and self.penalty < inf):
            raise DataError("min_tokens and penalty must not be negative")
        if self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens):
            raise DataError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")


def objective(sizes: npt.ArrayLike, cut_scores: npt.ArrayLike, penalty: float) -> float:
    """The value of one partition, straight from its definition."""
    blocks = np.asarray(sizes, dtype=np.float64)
    if not blocks.sum():
        return 0.0
    total = float(np.sum(cut_scores))
    return float(total / len(blocks) - penalty * blocks.std() / blocks.mean())


def segment(
    sizes: npt.ArrayLike, scores: npt.ArrayLike, options: SegmentOptions
) -> tuple[list[int], float]:
    """Best cuts for unit `sizes` (tokens) and `scores` (0-3, one per boundary between units).

    Returns the cut boundaries, rising (cut `b` lies after unit `b`), and the objective. A whole
    below twice the minimum stays one block, whatever its size.

    Raises:
        DataError: shapes differ, a size or score that is no finite number, or the limits cannot
            be kept.
    """
    units = np.asarray(sizes)
    values = np.asarray(scores, dtype=np.float64)
    if units.ndim != 1 or values.shape != (max(len(units) - 1, 0),):
        raise DataError(f"{units.shape} sizes need one score per boundary, not {values.shape}")
    if len(units) and (units.dtype.kind not in "iu" or units.min() < 0):
        raise DataError("unit sizes must be whole numbers of tokens, not negative")
    if not np.isfinite(values).all() or (values < 0).any():
        raise DataError("every boundary needs a finite score of at least 0")
    minimum = options.min_tokens
    maximum = inf if options.max_tokens is None else options.max_tokens
    total = int(units.sum())
    if total == 0 or (total < 2 * minimum and total <= maximum):
        return [], 0.0
    cuts = Search(units, values, minimum, maximum, options.penalty).run()
    if cuts is None:
        raise DataError(
            f"no partition has all blocks within {minimum}-{maximum} tokens (largest unit: "
            f"{units.max()}): raise the maximum or lower the minimum"
        )
    blocks = np.add.reduceat(units, [0, *(cut + 1 for cut in cuts)])
    return cuts, objective(blocks, values[cuts], options.penalty)


def cut_blocks(
    sentences: Sentences, scores: BoundaryScores, options: SegmentOptions | None = None
) -> Segmentation:
    """Blocks of a split and scored thought; relaxes `max_tokens` where a unit exceeds it.

    Raises:
        DataError: a score is missing or belongs to another split; limits that cannot be kept.
    """
    options = options or SegmentOptions()
    if scores.boundaries != sentences.candidates:
        raise DataError("the scores belong to another split of this thought")
    if scores.unknown:
        raise DataError(f"{len(scores.unknown)} of {len(scores.scores)} boundaries have no score")
    sizes = [sum(sentences.tokens[a : b + 1]) for a, b in sentences.units]
    values = [float(score) for score in scores.scores if score is not None]
    relaxed: tuple[str, ...] = ()
    if options.max_tokens is not None and not options.strict_max:
        fitting = _smallest_maximum(sizes, options)
        if fitting > options.max_tokens:
            relaxed = (f"max_tokens raised from {options.max_tokens} to {fitting}",)
            options = SegmentOptions(options.min_tokens, fitting, options.penalty)
    cuts, value = segment(np.asarray(sizes, dtype=np.int64), values, options)
    at = tuple(scores.boundaries[cut] for cut in cuts)
    return Segmentation(blocks=blocks_of(sentences, at), objective=value, relaxed=relaxed)


def keep_blocks(
    sentences: Sentences, scores: BoundaryScores, blocks: Sequence[Span], penalty: float
) -> Segmentation:
    """The blocks of a row that was cut before, and the objective that they reach.

    Raises:
        DataError: a block does not end with a sentence, or a score is missing.
    """
    edges = {edge: place for place, edge in enumerate(sentences.edges)}
    ends = [block.end for block in blocks if block.end > block.start]
    if not ends or ends[-1] != sentences.edges[-1] or not all(end in edges for end in ends):
        raise DataError("the row's blocks do not end where its sentences do")
    cuts = tuple(edges[end] - 1 for end in ends[:-1])
    graded = dict(zip(scores.boundaries, scores.scores, strict=True))
    values = [graded.get(cut) for cut in cuts]
    if None in values:
        raise DataError("a cut of the row has no score")
    kept = blocks_of(sentences, cuts)
    value = objective([block.tokens for block in kept], np.asarray(values, dtype=float), penalty)
    return Segmentation(blocks=kept, objective=value)


def _smallest_maximum(sizes: list[int], options: SegmentOptions) -> int:
    """The least maximum, from `max_tokens` up, that some partition keeps (bisection)."""
    edges = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))])
    total = int(edges[-1])
    low, high = options.max_tokens or 1, max(total, 1)
    if total < options.min_tokens:
        return max(low, total)
    while low < high:
        middle = (low + high) // 2
        if _feasible(edges, options.min_tokens, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _feasible(edges: npt.NDArray[np.int64], minimum: int, maximum: int) -> bool:
    first = np.searchsorted(edges, edges - maximum, side="left")
    last = np.searchsorted(edges, edges - minimum, side="right")
    last = np.minimum(last, np.arange(len(edges)))
    reached = np.zeros(len(edges) + 1, dtype=np.int64)  # reached[i]: reachable edges before i
    reached[1] = 1
    for edge in range(1, len(edges)):
        ok = reached[last[edge]] > reached[first[edge]] if last[edge] > first[edge] else False
        reached[edge + 1] = reached[edge] + int(ok)
    return bool(reached[-1] > reached[-2])
