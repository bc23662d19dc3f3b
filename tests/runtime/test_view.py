"""What the page of `memento view` holds; `test_view_browser.py` drives it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from memento_frontend.results import Reasoning
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import Problem, held_out
from memento_sgl.errors import DataError
from memento_sgl.offline.inputs.formats import END_OF_TURN, Trace, traces_of
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.offline.rollout.record import RolloutRecord
from memento_sgl.offline.simulate.replay import Replayer, simulate
from memento_sgl.offline.view.page import Page, drawn
from memento_sgl.rule.accounting import account, kv_curve
from memento_sgl.rule.config import MementoConfig

EVIL = "</script><script>window.owned=1</script><!--<b>\u2028&amp;"
(PROBLEM,) = held_out(1, sizes=[5])


@pytest.fixture(scope="module")
def replayer() -> Replayer:
    return Replayer(TextTokenizer(MODEL_DIR), MementoConfig(enable=True, mask_delimiters=False))


def row(problem: Problem, **more: Any) -> dict[str, Any]:
    return {"problem": problem.question, "response": problem.output} | more


def drawing(replayer: Replayer, value: Any, keep_last: int | None = None) -> dict[str, Any]:
    (trace,) = traces_of(value, "t")
    return json.loads(json.dumps(drawn(trace, replayer, keep_last)))


@pytest.mark.parametrize("keep_last", [0, 1, -1])
def test_parts_cover_the_text_and_grey_exactly_the_evicted_spans(
    replayer: Replayer, keep_last: int
) -> None:
    (trace,) = traces_of(row(PROBLEM), "t")
    found = drawing(replayer, row(PROBLEM), keep_last)
    tokens = replayer.tokens(trace)
    machine = replayer.machine(tokens, keep_last)
    length = len(tokens.ids)
    assert found["text"] == f"{trace.prompt}{trace.output}"
    assert sum(found["sizes"]) == len(found["text"])
    edges = [0, *(part[2] for part in found["parts"])]
    assert [part[1] for part in found["parts"]] == edges[:-1]
    assert edges[-1] == length == found["length"]
    seen = [e for e in machine.evictions if e.point < length - 1]
    assert (len(seen) > 0) == (keep_last >= 0)
    grey = {i for part in found["parts"] if part[4] is not None for i in range(part[1], part[2])}
    assert grey == {i for e in seen for i in range(e.start, e.end)}
    for _, start, _, _, eviction in found["parts"]:
        if eviction is not None:
            point, first, last = found["evictions"][eviction]
            assert first <= start < last <= point
    held = kv_curve(seen, length - 1)
    corners = dict(map(tuple, found["curve"]))
    assert {query: held[query] for query in corners} == corners
    drops = [q for q in range(1, length - 1) if held[q] != held[q - 1] + 1]
    assert set(drops) <= corners.keys()
    expected = account(machine, tokens.prompt_len, length).as_dict()
    assert found["record"] == {name: expected[name] for name in found["record"]}


def test_parts_name_their_block(replayer: Replayer) -> None:
    found = drawing(replayer, row(PROBLEM))
    starts = [0]
    for size in found["sizes"]:
        starts.append(starts[-1] + size)
    texts = {"block": [], "memento": []}
    for kind, start, end, block, _ in found["parts"]:
        if kind in texts:
            assert block == len(texts[kind])
            texts[kind].append(found["text"][starts[start] : starts[end]])
    assert texts["memento"] == re.findall(r"summary_start\|>(.*?)<", PROBLEM.output)
    assert texts["block"] == re.findall(r"block_start\|>(.*?)<\|block_end", PROBLEM.output)


def test_sizes_are_those_of_the_browser(replayer: Replayer) -> None:
    text = "a\U0001f600b<|block_start|>\U0001f600<|block_end|>"
    found = drawing(replayer, {"response": text})
    assert sum(found["sizes"]) == len(text.encode("utf-16-le")) // 2
    assert found["sizes"][:3] == [1, 2, 1]


def formats(replayer: Replayer) -> dict[str, Callable[[], Any]]:
    """The same request in every format that has its prompt."""
    (trace,) = traces_of(row(PROBLEM), "t")
    tokens = replayer.tokens(trace)
    ids, size = tokens.ids, tokens.prompt_len
    machine = replayer.machine(tokens)
    answer = {
        "output_ids": ids[size:],
        "meta_info": {
            "prompt_tokens": size,
            "completion_tokens": len(ids) - size,
            "memento": account(machine, size, len(ids)).as_dict(),
        },
    }
    record = RolloutRecord.from_generate(answer, ids[:size], replayer.markers)
    return {
        "row": lambda: row(PROBLEM),
        "chat text": lambda: {"text": f"{trace.prompt}{PROBLEM.output}{END_OF_TURN}"},
        "ids": lambda: ids,
        "two lists": lambda: {"prompt_ids": ids[:size], "output_ids": ids[size:]},
        "tokenized": lambda: {"input_ids": ids, "prompt_tokens": size},
        "rollout": lambda: json.loads(record.model_dump_json()),
        "answer": lambda: answer,
    }


@pytest.mark.parametrize(
    "name", ["row", "chat text", "ids", "two lists", "tokenized", "rollout", "answer"]
)
def test_every_format_draws_the_same(replayer: Replayer, name: str) -> None:
    expected = drawing(replayer, row(PROBLEM))
    found = drawing(replayer, formats(replayer)[name]())
    ignored = {"text", "sizes", "notes"} if name == "answer" else set()
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }
    if name == "answer":
        assert found["text"] == PROBLEM.output + END_OF_TURN
        assert "does not hold the prompt" in found["notes"][0]


def test_saved_spans_win_over_the_rule(replayer: Replayer) -> None:
    answer = formats(replayer)["answer"]()
    meta = answer["meta_info"]
    record = meta["memento"] | {"peak_kv_tokens": 7}
    record["evicted_spans"] = record["evicted_spans"][:1]
    record["eviction_points"] = record["eviction_points"][:1]
    found = drawing(replayer, answer | {"meta_info": meta | {"memento": record}})
    assert len(found["evictions"]) == 1
    assert [block["eviction"] for block in found["blocks"]] == [0, None, None, None, None]
    assert found["record"]["peak_kv_tokens"] == 7


def test_answers_of_think_and_batch(replayer: Replayer) -> None:
    answer = formats(replayer)["answer"]()
    meta, ids = answer["meta_info"], tuple(answer["output_ids"])
    thought = Reasoning((), "", accounting=meta["memento"], prompt_tokens=meta["prompt_tokens"])
    attempt = asdict(replace(thought, output_ids=ids))
    result = {"id": "q", "answer": "", "votes": 1, "error": None, "input": {}}
    result["attempts"] = json.loads(json.dumps([attempt, attempt]))
    found = traces_of(result, "t")
    assert [trace.name for trace in found] == ["q#0", "q#1"]
    (expected,) = traces_of(answer, "t")
    for trace in (*found, *traces_of(result["attempts"][0], "t")):
        assert drawn(trace, replayer) == drawn(expected, replayer) | {"name": trace.name}
    with pytest.raises(DataError, match="no token ids"):
        traces_of(asdict(thought), "t")
    with pytest.raises(DataError, match="it failed: timeout"):
        traces_of(result | {"attempts": [], "error": "timeout"}, "t")


def test_trace_files_of_the_server(replayer: Replayer) -> None:
    (trace,) = traces_of(row(PROBLEM), "t")
    tokens = replayer.tokens(trace)
    machine = replayer.machine(tokens)
    length, size = len(tokens.ids), tokens.prompt_len
    record = account(machine, size, length).as_dict()
    times = {"time": 0.5, "rows_before": 9, "rows_after": 3}
    saved = {
        "format": "memento-trace-1",
        "id": "t",
        "tokens": {"prompt": size, "cached": 0, "output": length - size},
        "accounting": {name: value for name, value in record.items() if isinstance(value, int)},
        "blocks": [block._asdict() | {"opened": 0.1} for block in machine.blocks],
        "evictions": [e._asdict() | times for e in machine.evictions if e.point < length - 1],
        "every": {"blocks": 1, "evictions": 1, "events": 1, "kv": 3},
    }
    found, expected = drawing(replayer, saved), drawing(replayer, row(PROBLEM))
    ignored = {"text", "sizes", "notes", "name", "parts"}
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }
    assert [part[3:] for part in found["parts"]] == [part[3:] for part in expected["parts"]]
    assert found["notes"] == ["The file holds no text."]
    for keep_last in (0, 2, -1):
        again = simulate(replayer, replayer.tokens(traces_of(saved, "t")[0]), keep_last)
        assert again == simulate(replayer, tokens, keep_last)
    with pytest.raises(DataError, match="only every 3th of its blocks"):
        traces_of(saved | {"every": {"blocks": 3, "evictions": 1}}, "t")


def test_openai_answers(replayer: Replayer) -> None:
    full = formats(replayer)["answer"]()["meta_info"]
    usage = {"prompt_tokens": full["prompt_tokens"], "completion_tokens": full["completion_tokens"]}
    thought, _, answer = PROBLEM.output.removeprefix("<think>\n").partition("\n</think>\n")
    split = {"content": answer, "reasoning_content": thought}
    for message in ({"content": PROBLEM.output}, split):
        body = {
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage,
            "metadata": {"memento": [full["memento"]]},
        }
        found = drawing(replayer, body)
        assert found["text"].endswith(PROBLEM.output)
        assert len(found["evictions"]) == len(full["memento"]["evicted_spans"]) == 5
        assert not any("approximate" in note for note in found["notes"])
    body["usage"] = usage | {"completion_tokens": 9}
    assert any("approximate" in note for note in drawing(replayer, body)["notes"])
    several = traces_of(body | {"choices": body["choices"] * 2, "metadata": None}, "t")
    assert [trace.name for trace in several] == ["t#0", "t#1"]


def test_hostile_text_stays_text(replayer: Replayer, tmp_path: Path) -> None:
    page = Page(EVIL, None)
    page.add(drawn(Trace(EVIL, EVIL, f"<|block_start|>{EVIL}<|block_end|>"), replayer))
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 5
    data = text.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&") & set(data)
    assert json.loads(data)["requests"][0]["name"] == EVIL
    assert "window.owned=1</script>" not in text
    assert "default-src 'none'" in text


def test_the_page_needs_no_network_and_no_markup_from_text() -> None:
    page = Page("t", None)
    page.add({"name": "x"})
    text = page.render()
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML", text)


def test_command(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(p, id=f"p{i}")) for i, p in enumerate(held_out(3, sizes=[2]))]
    rows.write_text("\n".join([*lines, '{"answer": 3}']))
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["view", str(rows), "--out", str(out)])
    assert done.exit_code == 3
    assert "rows.jsonl:4" in done.output
    assert "no known format" in done.output
    assert f"wrote {out}: 3 requests" in done.output
    few = CliRunner().invoke(app, ["view", str(rows), "--out", str(out), "--limit", "2"])
    assert (few.exit_code, few.output) == (0, f"wrote {out}: 2 requests\n")
    bad = tmp_path / "bad.json"
    bad.write_text("[99999999]")
    out.unlink()
    nothing = CliRunner().invoke(app, ["view", str(bad), "--out", str(out)])
    assert nothing.exit_code == 3
    assert "token id 99999999 is not in model/tokenizer.json" in nothing.output
    assert not out.exists()
    missing = CliRunner().invoke(app, ["view", str(tmp_path / "no.txt")])
    assert missing.exit_code == 2
    away = CliRunner().invoke(app, ["view", str(rows), "--out", str(tmp_path / "no" / "page.html")])
    assert (away.exit_code, "no/page.html" in away.output) == (2, True)
