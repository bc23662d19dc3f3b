"""Blocks within their largest size where the splitter wants no cut at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memento_pipeline.output.export import write_outputs
from memento_pipeline.output.validate import validate_row
from memento_pipeline.records import BoundaryScores, Segmentation, Sentences
from memento_pipeline.stages.relax import cut_thought
from memento_pipeline.stages.rules import rule_scores
from memento_pipeline.stages.segment import SegmentOptions, cut_blocks
from memento_pipeline.text.split import split
from memento_pipeline.text.tokens import ApproxCounter
from rows import convert

from memento_sgl.errors import DataError

COUNTER = ApproxCounter()
WORDS = "First I look at the values. Then I write them down, one by one.\n\n"
TABLE = "".join(f"| {n} | {n * n} | {n**3} | {n % 7} | = {n * 13} |\n" for n in range(3000))
LISTING = "```python\n" + "".join(f"x{n} = f({n}, {n + 1})\n" for n in range(600)) + "```\n\n"
OPTIONS = SegmentOptions(min_tokens=200, max_tokens=1500)


def parts(thought: str) -> tuple[Sentences, BoundaryScores]:
    sentences = split(thought, COUNTER)
    return sentences, rule_scores(thought, sentences)


def cut(thought: str, options: SegmentOptions = OPTIONS) -> Segmentation:
    return cut_thought(thought, *parts(thought), options, COUNTER)


@pytest.mark.parametrize("unit", [TABLE, LISTING], ids=["table", "listing"])
def test_a_unit_that_is_too_large_is_cut_at_its_lines(unit: str) -> None:
    thought = WORDS * 40 + unit + WORDS * 40
    sentences, scores = parts(thought)
    assert cut_blocks(sentences, scores, OPTIONS).relaxed[0].startswith("max_tokens raised")
    found = cut(thought)
    assert max(block.tokens for block in found.blocks) <= 1500
    assert min(block.tokens for block in found.blocks) >= 200
    assert "".join(block.text(thought) for block in found.blocks) == thought
    assert all(block.text(thought).endswith("\n") for block in found.blocks)
    assert found.relaxed == ("cut at lines inside what belongs together: max_tokens is 1500",)
    assert found.finer is not None
    texts = found.finer.sentences.texts(thought)
    assert "".join(texts) == thought
    # What was scored before keeps its score.
    old = {sentences.edges[b + 1]: s for b, s in zip(scores.boundaries, scores.scores, strict=True)}
    finer = found.finer
    new = {
        finer.sentences.edges[b + 1]: s
        for b, s in zip(finer.scores.boundaries, finer.scores.scores, strict=True)
    }
    assert {edge: new[edge] for edge in old} == old
    assert {new[edge] for edge in new.keys() - old.keys()} == {0.0}


def test_only_then(tmp_path: Path) -> None:
    thought = WORDS * 200
    sentences, scores = parts(thought)
    assert cut(thought) == cut_blocks(sentences, scores, OPTIONS)
    assert cut(thought + TABLE, SegmentOptions(200)).finer is None


def test_what_cannot_be_kept_is_still_said() -> None:
    """A single line of 4,000 tokens."""
    thought = WORDS * 40 + "| 1 " * 2000 + "\n" + WORDS * 40
    assert any("max_tokens raised" in note for note in cut(thought).relaxed)
    with pytest.raises(DataError, match="no partition"):
        cut(thought, SegmentOptions(200, 1500, strict_max=True))


def test_a_whole_run(tmp_path: Path) -> None:
    """Sentences, scores and blocks of the rows agree with each other."""
    row = {"id": "t", "problem": "p", "cot": WORDS * 20 + LISTING + WORDS * 20, "answer": "a"}
    (done,) = convert(tmp_path, [row], segment=OPTIONS)
    assert done.reason is None
    write_outputs(tmp_path / "work", [done], COUNTER)
    for name in ("full", "default"):
        written = json.loads((tmp_path / "work" / name / "train.jsonl").read_text())
        assert validate_row(written) == []
    extras = json.loads((tmp_path / "work/extras/train.jsonl").read_text())
    assert max(extras["block_tokens"]) <= 1500
    assert max(extras["boundaries"]) < len(extras["sentence_edges"]) - 1
    assert extras["relaxed"][0].startswith("cut at lines")
