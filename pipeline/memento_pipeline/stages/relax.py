"""Cuts where the splitter wants none, when nothing else keeps blocks within their largest size.

A table of thousands of lines, a long listing or a long derivation is one unit for the splitter.
Such a unit is cut at its lines, inside sentences too; the finer sentences take the place of the
others for this thought.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

from memento_pipeline.records import BoundaryScores, Finer, Segmentation, Sentences
from memento_pipeline.stages.segment import SegmentOptions, cut_blocks
from memento_pipeline.text.tokens import TokenCounter, count_between

_PIECES = 16
"""New boundaries lie at least this part of the largest block apart: enough to choose from."""


def cut_thought(
    thought: str,
    sentences: Sentences,
    scores: BoundaryScores,
    options: SegmentOptions,
    counter: TokenCounter,
) -> Segmentation:
    """The blocks of a split and scored thought, with `Segmentation.finer` set where lines inside a
    unit had to be cut.

    Raises:
        DataError: as `cut_blocks`.
    """
    found = cut_blocks(sentences, scores, replace(options, strict_max=False))
    for everywhere in (False, True):  # first only within units that are too large
        if not found.relaxed or options.max_tokens is None:
            break
        finer = _finer(thought, sentences, scores, options.max_tokens, counter, everywhere)
        again = cut_blocks(finer.sentences, finer.scores, replace(options, strict_max=False))
        if _largest(again) < _largest(found):
            found = again.model_copy(update={"finer": finer})
    if found.finer is None:
        return cut_blocks(sentences, scores, options) if found.relaxed else found
    if options.strict_max and found.relaxed:
        return cut_blocks(found.finer.sentences, found.finer.scores, options)
    note = f"cut at lines inside what belongs together: max_tokens is {options.max_tokens}"
    return found.model_copy(update={"relaxed": (note, *found.relaxed)})


def _finer(
    thought: str,
    sentences: Sentences,
    scores: BoundaryScores,
    most: int,
    counter: TokenCounter,
    everywhere: bool,
) -> Finer:
    """Sentences and scores with boundaries of score 0 at the lines of units that are too large."""
    lines = _line_ends(thought, sentences, most, everywhere)
    edges = sorted({*sentences.edges, *lines})
    tokens = count_between(counter, thought, edges)
    known = dict(zip(scores.boundaries, scores.scores, strict=True))
    by = dict(zip(scores.boundaries, scores.decided_by, strict=True))
    old = {sentences.edges[b + 1]: b for b in range(len(sentences) - 1)}
    kept = {sentences.edges[b + 1] for b in sentences.candidates}
    new = _spread(edges, tokens, lines - kept, kept, max(1, most // _PIECES))
    allowed = [edge in kept or edge in new for edge in edges[1:-1]]
    at = [b for b, free in enumerate(allowed) if free]
    places = [old.get(edges[b + 1]) if edges[b + 1] in kept else None for b in at]
    return Finer(
        sentences=Sentences(
            edges=tuple(edges),
            no_cut=tuple(not free for free in allowed),
            tokens=tuple(tokens),
            tokenizer=sentences.tokenizer,
        ),
        scores=BoundaryScores(
            boundaries=tuple(at),
            scores=tuple(0.0 if b is None else known[b] for b in places),
            decided_by=tuple("rule" if b is None else by[b] for b in places),
        ),
    )


def _line_ends(thought: str, sentences: Sentences, most: int, everywhere: bool) -> set[int]:
    """Characters after which a line ends within the units in question; where a unit has a single
    line, its sentence ends."""
    ends: set[int] = set()
    for first, last in sentences.units:
        if not everywhere and sum(sentences.tokens[first : last + 1]) <= most:
            continue
        start, end = sentences.span(first, last)
        place = thought.find("\n", start, end - 1)
        if place < 0:
            ends.update(sentences.edges[first + 1 : last + 1])
        while place >= 0:
            ends.add(place + 1)
            place = thought.find("\n", place + 1, end - 1)
    return ends


def _spread(
    edges: list[int], tokens: list[int], wanted: Collection[int], kept: Collection[int], step: int
) -> set[int]:
    """Of the wanted edges those with at least `step` tokens since the last one taken or kept."""
    chosen: set[int] = set()
    since = 0
    for (_, edge), size in zip(pairwise(edges), tokens, strict=True):
        since += size
        if edge in kept:
            since = 0
        elif edge in wanted and since >= step:
            chosen.add(edge)
            since = 0
    return chosen


def _largest(segmentation: Segmentation) -> int:
    return max((block.tokens for block in segmentation.blocks), default=0)
