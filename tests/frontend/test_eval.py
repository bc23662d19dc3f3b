"""Questions, grades, figures and the run of `memento eval`, against a canned chat server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memento_frontend.evaluation.grade import Graded
from memento_frontend.evaluation.questions import EvalQuestion, read_questions
from memento_frontend.evaluation.run import Arm, EvalSettings, evaluate
from memento_frontend.evaluation.summary import summarize_arm
from memento_frontend.evaluation.tables import page
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError, DataError, StoreError

GPQA = {
    "Record ID": "rec1",
    "Question": "Which?",
    "Correct Answer": "iron\n",
    "Incorrect Answer 1": "gold",
    "Incorrect Answer 2": "tin",
    "Incorrect Answer 3": "lead",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "answer", "kind", "id_"),
    [
        ({"ID": "2024-I-1", "Problem": "p", "Answer": 204}, "204", "math", "2024-I-1"),
        ({"problem": "p", "answer": "\\frac12", "unique_id": "t/1"}, "\\frac12", "math", "t/1"),
        ({"question": "p", "answer": "6 * 7 = 42\n#### 42"}, "42", "math", "1"),
        ({"question": "p", "choices": ["x", "y"], "answer": 1}, "y", "choice", "1"),
        ({"question": "p", "options": ["x", "y"], "answer": "A"}, "x", "choice", "1"),
        (GPQA, "iron", "choice", "rec1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parquet", [False, True])
def test_known_columns(
    row: dict[str, Any], answer: str, kind: str, id_: str, parquet: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("q.parquet" if parquet else "q.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        write(path, row)
    (found,) = read_questions(path)
    assert (found.kind, found.id) == (kind, id_)
    if kind == "choice":
        shown = dict(re.findall(r"^([A-Z])\) (.*)$", found.text, re.MULTILINE))
        assert shown[found.answer] == answer
    else:
        assert found.answer == answer
    assert found.text.endswith("\\boxed{}.")


def test_options_are_shuffled_by_seed(tmp_path: Path) -> None:
    rows = [GPQA | {"Record ID": f"r{number}"} for number in range(40)]
    path = write(tmp_path / "q.jsonl", *rows)
    first = [question.answer for question in read_questions(path)]
    assert set(first) == set("ABCD")
    assert first == [question.answer for question in read_questions(path)]
    assert first != [question.answer for question in read_questions(path, seed=1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, "no column of question, problem, prompt"),
        ({"question": "q"}, "no column of answer"),
        ({"question": "q", "answer": True}, "bool"),
        ({"question": "q", "answer": ""}, "empty"),
        ({"question": "q", "answer": "E", "choices": ["x", "y"]}, "none of the 2 options"),
        ([1], "expected an object"),
    ],
)
def test_what_is_no_question(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", row))


def test_grades() -> None:
    """Mathematics by value, letters and texts as such; the majority by what the answers mean."""
    half = EvalQuestion("1", "?", "\\frac{1}{2}", "math")
    answers = ["It is \\boxed{0.5}.", "\\boxed{\\frac{2}{4}}", "\\boxed{3}", "no idea", ""]
    graded = Graded(half, answers)
    assert graded.right == [True, True, False, False, False]
    assert graded.readable == [True, True, True, False, False]
    assert graded.majority_right
    assert not Graded(half, answers[2:]).majority_right
    letter = EvalQuestion("2", "?", "B", "choice")
    said = ["\\boxed{B}", "The answer is (B).", "**B**", "\\boxed{A} or B", "Both."]
    assert Graded(letter, said).right == [True, True, True, False, False]
    assert Graded(letter, said).readable == [True, True, True, True, False]
    text = EvalQuestion("3", "?", "New  York", "text")
    assert Graded(text, ["new york", "York"]).right == [True, False]
    with pytest.raises(ConfigError, match="--kind text"):
        Graded(EvalQuestion("4", "?", "", "math"), ["1"])


def attempt(answer: str, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "blocks": [{"tokens": 10, "memento_tokens": 4}, {"tokens": 20, "memento_tokens": 6}],
        "answer": answer,
        "unfinished": "",
        "finish_reason": "stop",
        "accounting": {
            "peak_kv_tokens": 30,
            "peak_kv_tokens_without": 60,
            "kv_auc": 100,
            "kv_auc_without": 400,
        },
        "output_tokens": 50,
    }
    return base | changes


def test_figures() -> None:
    questions = [EvalQuestion(str(n), "?", "1", "text") for n in range(3)]
    attempts = {
        "0": [attempt("1"), attempt("1")],
        "1": [attempt("1"), attempt("", finish_reason="length", blocks=[], accounting=None)],
    }
    found = summarize_arm(questions, attempts, failed=3)
    assert (found.questions, found.attempts, found.failed) == (2, 4, 3)
    assert (found.unreadable, found.cut) == (1, 1)
    assert found.pass_at_1 is not None
    assert found.majority is not None
    assert found.pass_at_1.mean == 0.75
    assert found.pass_at_1.low >= 0.5
    assert found.majority.mean == 1.0
    assert (found.blocks, found.block_tokens, found.memento_tokens) == (1.5, 15, 5)
    assert found.well_formed == 0.75
    assert (found.peak_kv, found.peak_kv_without, found.auc, found.auc_without) == (
        30,
        60,
        100,
        400,
    )
    nothing = summarize_arm(questions, {}, failed=1)
    assert nothing.pass_at_1 is nothing.peak_kv is None


class Canned(BaseHTTPRequestHandler):
    """Answers the number in the question; `off` arms answer one more. Fails where it is told to."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]]
    broken: bool

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        self.reply(200 if known else 404, {"data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.asked.append(body)
        if server.broken and len(server.asked) > 3:
            self.reply(400, {"error": {"message": "the disk is full"}})
            return
        off = body["custom_params"]["memento"].get("keep_last_n_blocks") == -1
        number = int(re.findall(r"\d+", body["messages"][-1]["content"])[0]) + off
        text = f"<think>x</think>\\boxed{{{number}}}"
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
        events = [{"id": "1", "choices": [choice]}, {"id": "1", "choices": [], "usage": USAGE}]
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.reply(200, data.encode(), "text/event-stream")

    def reply(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


USAGE = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        server.daemon_threads = True
        server.asked, server.broken = [], False  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def settings(server: Any, **changes: Any) -> EvalSettings:
    arms = [Arm.parse("on", url(server)), Arm.parse("off", url(server))]
    return EvalSettings(arms=arms, samples=2, **changes)


def test_arms_side_by_side_and_resumed(server: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *({"question": f"{n}?", "answer": n} for n in range(4)))
    questions = read_questions(path)
    out = tmp_path / "out.jsonl"
    found = evaluate(questions, out, settings(server), progress=False)
    assert len(server.asked) == 16
    assert {body["temperature"] for body in server.asked} == {0.6}
    assert {body["top_k"] for body in server.asked} == {20}
    assert found["on"].pass_at_1 is not None
    assert found["off"].pass_at_1 is not None
    assert (found["on"].pass_at_1.mean, found["off"].pass_at_1.mean) == (1.0, 0.0)
    assert found["on"].tokens == 9
    assert found["on"].peak_kv is None  # this server tells nothing of it
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while writing
    again = evaluate(questions, out, settings(server), progress=False)
    assert len(server.asked) == 16 + 11
    assert again == found
    with pytest.raises(StoreError, match="temperature"):
        evaluate(questions, out, settings(server, temperature=0.0), progress=False)
    markup = page("<b>", found, 2)
    assert "<b>" not in markup.replace("&lt;b&gt;", "")
    assert "100.0%" in markup


def test_a_server_that_refuses_ends_the_run(server: Any, tmp_path: Path) -> None:
    """Failures are no wrong answers; after several in a row the run ends and can go on."""
    path = write(tmp_path / "q.jsonl", *({"question": f"{n}?", "answer": n} for n in range(30)))
    server.broken = True
    command = [
        "eval", str(path), "--out", str(tmp_path / "o"), "--base-url", url(server), "-n", "1",
        "--arm", "on", "--concurrency", "1",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 5, result.output
    assert "the disk is full" in result.output
    assert len(server.asked) < 30
    server.broken = False
    html = tmp_path / "page.html"
    result = CliRunner().invoke(app, [*command, "--retry-failed", "--html", str(html)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "o.summary.json").read_text())
    assert summary["on"]["pass_at_1"]["mean"] == 1.0
    assert summary["on"]["attempts"] == 30
    assert "pass@1" in html.read_text()


def test_arm_names() -> None:
    assert Arm.parse("off", "u").memento == {"keep_last_n_blocks": -1}
    assert Arm.parse("x@http://a", "u") == Arm("x", "http://a", {})
    assert Arm.parse('k{"keep_last_n_blocks": 1}', "u").memento == {"keep_last_n_blocks": 1}
    for text in ("restart", "@http://a", "x{"):
        with pytest.raises(ConfigError):
            Arm.parse(text, "u")
