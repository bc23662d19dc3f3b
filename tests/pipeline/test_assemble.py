"""Rows: the thought byte for byte, markers only where they belong, back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memento_pipeline.output.assemble import (
    AssembleOptions,
    assemble_row,
    parse_response,
)
from memento_pipeline.output.export import write_outputs
from memento_pipeline.output.validate import validate_row
from memento_pipeline.read.rows import ReadOptions, read_traces
from memento_pipeline.records import Converted, Status, Trace
from memento_pipeline.run.converted import converted
from memento_pipeline.store.folder import Store
from memento_pipeline.text.escape import escape, special_count, unescape
from memento_pipeline.text.pairs import MARKERS, pairs
from memento_pipeline.text.tokens import ApproxCounter, count
from rows import HOSTILE, convert, trace
from scenes import options, run, serving

from memento_sgl.errors import DataError

COUNTER = ApproxCounter()
TOKENS = st.sampled_from(
    [
        *MARKERS,
        "<think>",
        "</think>",
        "<|im_end|>",
        "<｜x｜>",
        "\\",
        "<",
        "<\\",
        "|>",
        "a",
        " ",
        "\n",
    ]
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[Converted]:
    rows = [
        trace("plain", domain="math", source="s", difficulty=2),
        trace("hostile", hostile=True, problem="Say <|block_end|>\\</think>."),
        trace("long", paragraphs=30),
    ]
    rows[1]["cot"] += " </think> <|summary_end|>"
    return convert(tmp_path_factory.mktemp("rows"), rows)


@given(st.lists(TOKENS, max_size=30).map("".join))
@settings(max_examples=500, deadline=None)
def test_escaping_is_exact_and_complete(text: str) -> None:
    escaped = escape(text)
    assert unescape(escaped) == text
    assert special_count(escaped) == special_count(text)  # what is escaped is escaped again
    assert not [
        token for token in (*MARKERS, "<think>", "</think>", "<|im_end|>") if token in escaped
    ]
    assert (escaped == text) == (special_count(text) == 0)


def test_response_holds_the_thought_byte_for_byte(done: list[Converted]) -> None:
    for one in done:
        made = assemble_row(one, COUNTER)
        assert made.row is not None
        parsed = parse_response(made.row.response)
        assert unescape("".join(parsed.blocks)) == one.trace.thought
        assert unescape("".join(made.row.sentences)) == one.trace.thought
        assert [unescape(text) for text in parsed.mementos] == [
            m.text.strip() for m in one.mementos
        ]
        assert unescape(parsed.answer or "") == one.trace.answer
        assert unescape(made.row.problem) == one.trace.problem
        assert parsed.outside == ""
        assert len(parsed.blocks) == made.blocks > 1
        assert made.tokens == count(COUNTER, made.row.response)
        assert validate_row(made.row.model_dump(mode="json")) == []


def test_markers_of_the_text_are_no_markers_of_the_row(done: list[Converted]) -> None:
    hostile = done[1]
    made = assemble_row(hostile, COUNTER)
    assert made.row is not None
    assert hostile.trace.thought.count("<|block_end|>") == 2
    for marker in MARKERS:
        assert made.row.response.count(marker) == made.blocks
    assert made.row.response.count("</think>") == 1
    assert "<|im_end|>" not in made.row.response
    texts = [hostile.trace.problem, hostile.trace.thought, hostile.trace.answer]
    assert made.escaped == sum(map(special_count, texts)) > 2 * special_count(HOSTILE)


def test_shape_of_a_row(done: list[Converted]) -> None:
    row = assemble_row(done[0], COUNTER).row
    assert row is not None
    assert row.response.startswith("<think>\n<|block_start|>\n")  # the thought's own newline
    assert "<|block_end|>\n<|summary_start|>" in row.response
    assert row.response.endswith("<|summary_end|>\n</think>\nAll done.")
    assert (row.domain, row.source, row.difficulty) == ("math", "s", 2)
    flat = [place for first, last in row.blocks for place in range(first, last + 1)]
    assert flat == list(range(len(row.sentences)))


def test_over_long_rows(done: list[Converted]) -> None:
    whole = assemble_row(done[2], COUNTER)
    most = whole.tokens // 2
    dropped = assemble_row(done[2], COUNTER, AssembleOptions(max_tokens=most))
    assert dropped.row is None
    assert dropped.reason == f"too long: {whole.tokens} of at most {most} tokens"
    cut = assemble_row(done[2], COUNTER, AssembleOptions(max_tokens=most, too_long="cut"))
    assert cut.row is not None
    assert 1 < cut.blocks < whole.blocks
    assert cut.tokens == count(COUNTER, cut.row.response) <= most
    parsed = parse_response(cut.row.response)
    assert parsed.blocks == parse_response(whole.row.response).blocks[: cut.blocks]  # type: ignore[union-attr]
    assert parsed.answer == done[2].trace.answer
    assert validate_row(cut.row.model_dump(mode="json")) == []
    one_more = AssembleOptions(max_tokens=cut.tokens - 1, too_long="cut")
    assert assemble_row(done[2], COUNTER, one_more).blocks == cut.blocks - 1
    tiny = assemble_row(done[2], COUNTER, AssembleOptions(max_tokens=20, too_long="cut"))
    assert (tiny.row, tiny.blocks) == (None, 0)
    fits = assemble_row(done[2], COUNTER, AssembleOptions(max_tokens=whole.tokens))
    assert fits == whole


def test_only_ok_traces_become_rows(done: list[Converted]) -> None:
    failed = done[0].model_copy(update={"status": Status.FAILED, "reason": "the endpoint failed"})
    with pytest.raises(DataError, match="endpoint failed"):
        assemble_row(failed, COUNTER)
    other = done[0].trace.model_copy(update={"thought": done[0].trace.thought + "more"})
    with pytest.raises(DataError, match="do not add up"):
        assemble_row(done[0].model_copy(update={"trace": other}), COUNTER)


def back(path: Path) -> list[Trace]:
    found = list(read_traces([path]))
    assert all(isinstance(one, Trace) for one in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["default/train.jsonl", "full/train.parquet"])
def test_rows_are_read_back(done: list[Converted], name: str, tmp_path: Path) -> None:
    write_outputs(tmp_path, done, COUNTER)
    for one, again in zip(done, back(tmp_path / name), strict=True):
        assert (again.thought, again.problem) == (one.trace.thought, one.trace.problem)
        assert again.answer == one.trace.answer
        assert again.closed
        blocks = one.segmentation.blocks if one.segmentation else ()
        spans = [(block.char_start, block.char_end) for block in blocks]
        assert [tuple(span) for span in again.given_blocks] == spans
        assert list(again.given_mementos) == [m.text.strip() for m in one.mementos]
        assert "separators_lost" not in again.provenance


@pytest.mark.parametrize("name", ["default/train.parquet", "full/train.jsonl"])
def test_rows_are_cut_and_summarised_again(
    done: list[Converted], name: str, tmp_path: Path
) -> None:
    write_outputs(tmp_path, done, COUNTER)
    same = convert(tmp_path / "same", tmp_path / name)
    assert [one.segmentation for one in same] == [one.segmentation for one in done]
    assert [one.mementos for one in same] == [one.mementos for one in done]
    larger = {"segment": {"min_tokens": 600}}
    again = convert(tmp_path / "again", tmp_path / name, **larger)
    assert all(len(new.mementos) < len(old.mementos) for new, old in zip(again, done, strict=True))
    keep = ReadOptions(min_tokens=20, keep_blocks=True)
    kept = convert(tmp_path / "kept", tmp_path / name, read=keep, **larger)
    for new, old in zip(kept, done, strict=True):
        assert new.segmentation == old.segmentation
        assert new.mementos == old.mementos


def test_kept_blocks_cost_no_grading(done: list[Converted], tmp_path: Path) -> None:
    write_outputs(tmp_path, done, COUNTER)
    keep = ReadOptions(min_tokens=20, keep_blocks=True)
    with serving() as server:
        made = options(tmp_path / "w", tmp_path / "default/train.jsonl", server.url, read=keep)
        run(made)
    assert server.calls["score"] == 0
    assert server.calls["summarize"] == len(done)
    with Store(tmp_path / "w", create=False) as store:
        again = list(converted(store))
    assert [one.segmentation.blocks for one in again] == [  # type: ignore[union-attr]
        one.segmentation.blocks
        for one in done  # type: ignore[union-attr]
    ]


FOREIGN = (
    "<think>\n<|block_start|>\nFirst step of the proof, with 12 apples.\n<|block_end|>\n"
    "<|summary_start|>\n12 apples\n<|summary_end|>\n"
    "<|block_start|>Second step has no white space left at all.<|block_end|><|summary_start|>2"
    "<|summary_end|><|block_start|>Third step ends.<|block_end|><|summary_start|>3<|summary_end|>"
    "</think>\nDone."
)


def foreign(tmp_path: Path, **row: Any) -> Any:
    (tmp_path / "f.jsonl").write_text(
        json.dumps({"problem": "p", "response": FOREIGN} | row) + "\n"
    )
    (found,) = read_traces([tmp_path / "f.jsonl"])
    return found


def test_rows_of_other_writers(tmp_path: Path) -> None:
    found = foreign(tmp_path)
    assert found.given_mementos == ("12 apples", "2", "3")
    assert found.provenance["separators_lost"] == 1
    pieces = [found.thought[a:b] for a, b in found.given_blocks]
    assert "".join(pieces) == found.thought
    assert pieces[1:] == ["Second step has no white space left at all.\n", "Third step ends."]
    kept = convert(
        tmp_path / "w", tmp_path / "f.jsonl", read=ReadOptions(min_tokens=1, keep_blocks=True)
    )
    cut = kept[0].segmentation
    assert cut is not None
    assert [block.text(found.thought) for block in cut.blocks] == pieces
    stray = foreign(tmp_path, response=FOREIGN.replace("<think>\n", "<think>\nStray words. "))
    assert "outside its blocks" in stray.reason


def test_a_block_that_ends_inside_a_sentence_is_kept(tmp_path: Path) -> None:
    text = "<think><|block_start|>A word, then\n<|block_end|><|summary_start|>s<|summary_end|>"
    text += (
        "<|block_start|>so the rest of it.<|block_end|><|summary_start|>t<|summary_end|></think>"
    )
    foreign(tmp_path, response=text)
    keep = ReadOptions(min_tokens=1, keep_blocks=True)
    (one,) = convert(tmp_path / "w", tmp_path / "f.jsonl", read=keep)
    assert one.segmentation is not None
    pieces = [block.text(one.trace.thought) for block in one.segmentation.blocks]
    assert pieces == ["A word, then\n", "so the rest of it."]
    (again,) = convert(tmp_path / "v", tmp_path / "f.jsonl", read=ReadOptions(min_tokens=1))
    assert again.segmentation is not None
    assert len(again.segmentation.blocks) == 1


def test_both_shapes_are_those_of_openmementos(done: list[Converted], tmp_path: Path) -> None:
    write_outputs(tmp_path, done, COUNTER)
    default = ["problem", "response", "domain", "source", "difficulty"]
    full = [*default, "sentences", "blocks", "block_summaries"]
    for name, columns in (("default", default), ("full", full)):
        table = pq.read_table(tmp_path / name / "train.parquet")
        assert table.column_names == columns
        assert str(table.schema.field("difficulty").type) == "int64"
        assert table.to_pylist() == [
            json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()
        ]
    difficulties = [row["difficulty"] for row in table.to_pylist()]
    assert difficulties == [2, None, None]


@pytest.mark.parametrize("marker", MARKERS)
def test_pairs_are_found_in_linear_time(marker: str) -> None:
    """A hundred thousand markers without a partner, where backtracking would take hours."""
    text = f"{marker}word " * 100_000
    assert list(pairs(text)) == []
    whole = "<|block_start|>b<|block_end|> \n<|summary_start|>s<|summary_end|>"
    assert [(p.block, p.memento) for p in pairs(text + whole + text)] == [("b", "s")]


def test_pairs_need_their_order_and_nothing_between() -> None:
    bs, be, ss, se = MARKERS
    assert [p.block for p in pairs(f"{bs}a{bs}b{be}{ss}c{se}{se}{bs}d{be}{ss}{se}")] == ["b", "d"]
    for text in (
        f"{bs}a{be}words{ss}b{se}",
        f"{be}{ss}{se}{bs}",
        f"{bs}a{ss}b{se}",
        f"{bs}{be}{be}",
    ):
        assert list(pairs(text)) == []
    assert [p.memento for p in pairs(f"{bs}a{be}{bs}b{be}{ss}c{se}")] == ["c"]
