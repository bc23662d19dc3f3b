"""Segmentation equals brute force, keeps its limits and says when it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memento_pipeline.records import BoundaryScores, Sentences
from memento_pipeline.stages import hull as _hull
from memento_pipeline.stages.segment import SegmentOptions, cut_blocks, objective, segment

from memento_sgl.errors import DataError

SCORES = {
    "integer": st.integers(0, 3).map(float),
    "half": st.integers(0, 6).map(lambda n: n / 2),
    "continuous": st.floats(0, 3),
}


def brute_force(sizes: list[int], scores: list[float], options: SegmentOptions) -> float | None:
    """The best objective over all partitions within the limits, one by one."""
    maximum = options.max_tokens or sum(sizes) + 1
    best = None
    for mask in range(1 << (len(sizes) - 1)):
        cuts = [b for b in range(len(sizes) - 1) if mask >> b & 1]
        blocks = np.add.reduceat(sizes, [0, *(cut + 1 for cut in cuts)])
        small = blocks.min() < options.min_tokens and len(blocks) > 1
        if small or blocks.max() > maximum:
            continue
        value = objective(blocks, [scores[cut] for cut in cuts], options.penalty)
        best = value if best is None else max(best, value)
    return best


@pytest.mark.parametrize("kind", SCORES)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_equals_brute_force(kind: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    scores = data.draw(st.lists(SCORES[kind], min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    low = data.draw(st.integers(0, 50))
    high = data.draw(st.none() | st.integers(max(low, 1), 120))
    options = SegmentOptions(low, high, data.draw(st.sampled_from([0.0, 0.1, 0.5, 2.0])))
    expected = brute_force(sizes, scores, options)
    if expected is None:
        with pytest.raises(DataError, match="no partition"):
            segment(sizes, scores, options)
        return
    cuts, value = segment(sizes, scores, options)
    blocks = np.add.reduceat(sizes, [0, *(cut + 1 for cut in cuts)])
    assert value == pytest.approx(expected, abs=1e-9)
    assert value == objective(blocks, [scores[cut] for cut in cuts], options.penalty)
    assert len(blocks) == 1 or blocks.min() >= low
    assert high is None or blocks.max() <= high


def test_a_prefix_rule_would_miss_the_optimum() -> None:
    """The best prefixes by the prefixes' own objective do not extend to the best whole."""
    rng = np.random.default_rng(3)
    worse = 0
    for _ in range(40):
        sizes = rng.integers(20, 120, 12)
        scores = rng.random(11) * 3
        options = SegmentOptions(100)
        worse += _by_prefixes(sizes, scores, options) < segment(sizes, scores, options)[1] - 1e-9
    assert worse > 0


def _by_prefixes(sizes: np.ndarray, scores: np.ndarray, options: SegmentOptions) -> float:
    edges = np.concatenate([[0], np.cumsum(sizes)])
    kept: list[dict[int, list[int]]] = [{0: [0]}]
    for end in range(1, len(edges)):
        here: dict[int, list[int]] = {}
        for start in range(end):
            if edges[end] - edges[start] < options.min_tokens:
                continue
            for count, bounds in kept[start].items():
                trial = [*bounds, end]
                if count + 1 not in here or _at(edges, scores, trial) > _at(
                    edges, scores, here[count + 1]
                ):
                    here[count + 1] = trial
        kept.append(here)
    return max(_at(edges, scores, bounds) for bounds in kept[-1].values())


def _at(edges: np.ndarray, scores: np.ndarray, bounds: list[int]) -> float:
    return objective(np.diff(edges[bounds]), scores[[b - 1 for b in bounds[1:-1]]], 0.5)


@pytest.mark.parametrize("total", [0, 1, 150, 200, 399])
def test_a_short_whole_is_one_block(total: int) -> None:
    sizes = [total // 3, total // 3, total - 2 * (total // 3)]
    assert segment(sizes, [3.0, 3.0], SegmentOptions(200)) == ([], 0.0)


def test_empty() -> None:
    assert segment(np.zeros(0, dtype=int), [], SegmentOptions()) == ([], 0.0)


def test_long_traces_are_searched_in_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    solve = _hull.Search._solve

    def counted(self: _hull.Search, slope: float) -> None:
        nonlocal passes
        passes += 1
        solve(self, slope)

    monkeypatch.setattr(_hull.Search, "_solve", counted)
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(4, 0.6, 600).astype(int) + 5
    cuts, value = segment(sizes, rng.integers(0, 4, 599), SegmentOptions())
    blocks = np.add.reduceat(sizes, [0, *(cut + 1 for cut in cuts)])
    assert blocks.min() >= 200
    assert value > 2.5
    assert passes <= 30


@pytest.mark.parametrize(
    ("sizes", "scores", "message"),
    [
        ([1, 2], [], "one score per boundary"),
        ([1, -2], [1.0], "not negative"),
        ([1.5, 2.0], [1.0], "whole numbers"),
        ([1, 2], [float("nan")], "finite score"),
        ([1, 2], [-1.0], "at least 0"),
    ],
)
def test_bad_input(sizes: list[float], scores: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        segment(sizes, scores, SegmentOptions(0))


@pytest.mark.parametrize(
    "options", [{"min_tokens": -1}, {"penalty": -0.1}, {"min_tokens": 9, "max_tokens": 8}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(DataError):
        SegmentOptions(**options)  # type: ignore[arg-type]


def scored(tokens: list[int], scores: list[float | None]) -> tuple[Sentences, BoundaryScores]:
    edges = tuple(range(0, 10 * len(tokens) + 1, 10))
    sentences = Sentences(
        edges=edges,
        no_cut=(False,) * (len(tokens) - 1),
        tokens=tuple(tokens),
        tokenizer="test",
    )
    by = tuple(None if score is None else "rule" for score in scores)
    return sentences, BoundaryScores(
        boundaries=sentences.candidates, scores=tuple(scores), decided_by=by
    )


def test_blocks_cover_the_thought() -> None:
    sentences, scores = scored([100, 150, 120, 130, 140, 160], [0.0, 3.0, 1.0, 3.0, 0.0])
    result = cut_blocks(sentences, scores)
    assert [(b.first_sentence, b.last_sentence) for b in result.blocks] == [(0, 1), (2, 3), (4, 5)]
    assert [b.tokens for b in result.blocks] == [250, 250, 300]
    assert (result.blocks[0].char_start, result.blocks[-1].char_end) == (0, 60)
    assert not result.relaxed


def test_a_unit_beyond_the_maximum_relaxes_it_and_says_so() -> None:
    sentences, scores = scored([250, 900, 250], [3.0, 3.0])
    options = SegmentOptions(200, 400)
    result = cut_blocks(sentences, scores, options)
    assert [b.tokens for b in result.blocks] == [250, 900, 250]
    assert result.relaxed == ("max_tokens raised from 400 to 900",)
    with pytest.raises(DataError, match="largest unit: 900"):
        cut_blocks(sentences, scores, SegmentOptions(200, 400, strict_max=True))


def test_missing_or_foreign_scores() -> None:
    sentences, scores = scored([250, 250], [None])
    with pytest.raises(DataError, match="1 of 1 boundaries have no score"):
        cut_blocks(sentences, scores)
    with pytest.raises(DataError, match="another split"):
        cut_blocks(scored([1, 2, 3], [1.0, 1.0])[0], scores)
