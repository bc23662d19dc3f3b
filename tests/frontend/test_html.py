"""What notebooks show of results and records."""

from __future__ import annotations

from memento_frontend.results import Block, Reasoning

from memento_sgl.offline.rollout.record import RolloutRecord

RECORD = {
    "evicted_spans": [(5, 9)],
    "evicted_tokens": 4,
    "peak_kv_tokens": 30,
    "peak_kv_tokens_without": 40,
}


def test_a_thought_is_shown_folded_and_escaped() -> None:
    blocks = (Block("<script>alert(1)</script>", "one", 4), Block("two", "<b>2</b>"))
    found = Reasoning(blocks, "x < y", "cut <i>", "length", RECORD)
    shown = found._repr_html_()
    assert shown.count("<details") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    for tag in ("<script", "<b>2", "<i>"):
        assert tag not in shown
    assert "(block, 4 tokens, evicted)" in shown
    assert "(block, kept)" in shown
    assert "<b>x &lt; y</b> <small>(length)</small>" in shown
    assert "peak 30 instead of 40, 4 evicted in 1 blocks" in shown


def test_a_server_that_does_not_count() -> None:
    shown = Reasoning((), "yes", finish_reason="stop")._repr_html_()
    assert "KV" not in shown
    assert "<b>yes</b></div>" in shown


def test_a_rollout_is_a_table() -> None:
    record = RolloutRecord(
        id="<a>", prompt_ids=[1], output_ids=[2, 3, 4, 5, 6, 7], block_spans=[(2, 3)],
        memento_spans=[(5, 6)], evictions=[(6, 2, 3, 6)],
    )  # fmt: skip
    shown = record._repr_html_()
    assert "<th>id</th><td>&lt;a&gt;</td>" in shown
    assert "[2, 3) at 6" in shown
