"""Files of questions against a real server: ended at any time, the same call goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Served
from typer.testing import CliRunner

pytest.importorskip("sglang")

from memento_frontend.batch import run_batch
from memento_frontend.native import NativeClient
from memento_frontend.options import Options

from memento_sgl.cli.app import app
from memento_sgl.demo.task import Problem, held_out
from memento_sgl.errors import ConfigError, StoppedError, StoreError

pytestmark = pytest.mark.server

PROBLEMS = held_out(6, sizes=(2, 3, 4))


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("demo", "demo", "--chat-template", "memento_nosys")


@pytest.fixture
def client(server: Served) -> NativeClient:
    return NativeClient(server.url)


def rows(problems: list[Problem]) -> list[dict[str, Any]]:
    return [{"question": p.question, "gold": p.answer} for p in problems]


def results(path: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    found = {record["id"]: record for record in records}
    assert len(found) == len(records)
    return found


def batch(client: NativeClient, questions: Any, out: Path, **options: Any) -> Any:
    settings = options.pop("options", Options.greedy())
    return run_batch(questions, out, client, settings, progress=False, **options)


def test_every_question_gets_its_line(client: NativeClient, tmp_path: Path) -> None:
    asked = rows(PROBLEMS)
    by_step = batch(client, asked, tmp_path / "steps.jsonl", concurrency=3)
    assert (by_step.total, by_step.earlier, by_step.answered, by_step.failed) == (6, 0, 6, 0)
    batch(client, asked, tmp_path / "one.jsonl", one_call=True)
    found, other = results(tmp_path / "steps.jsonl"), results(tmp_path / "one.jsonl")
    for number, problem in enumerate(PROBLEMS, start=1):
        record = found[str(number)]
        assert record["answer"] == record["input"]["gold"] == problem.answer
        (attempt,) = record["attempts"]
        assert len(attempt["blocks"]) == len(problem.groups)
        assert attempt["output_ids"] == other[str(number)]["attempts"][0]["output_ids"]


def test_it_goes_on_with_new_questions_and_retries_failures(
    client: NativeClient, tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    long = {"question": "7" * 5000, "id": "long"}
    first = batch(client, [*rows(PROBLEMS[:2]), long], out)
    assert (first.answered, first.failed) == (2, 1)
    failed = results(out)["long"]
    assert failed["answer"] is None
    assert "the context ends at 4096" in failed["error"]
    more = [*rows(PROBLEMS[:2]), long, *rows(PROBLEMS[3:4])]
    again = batch(client, more, out)
    assert (again.total, again.earlier, again.answered, again.failed) == (4, 3, 3, 1)
    retried = batch(client, more, out, retry_failed=True)
    assert (retried.earlier, retried.failed) == (3, 1)
    assert len(results(out)) == 4
    with pytest.raises(StoreError, match=r"options\.max_tokens: 32768 then, 99 now"):
        batch(client, more, out, options=Options.greedy(max_tokens=99))
    with pytest.raises(StoreError, match="another question '1'"):
        batch(client, rows(PROBLEMS[4:]), out)


def test_several_attempts(client: NativeClient, tmp_path: Path) -> None:
    for one_call in (False, True):
        out = tmp_path / f"{one_call}.jsonl"
        batch(client, rows(PROBLEMS[:1]), out, attempts=2, one_call=one_call)
        record = results(out)["1"]
        assert (record["answer"], record["votes"]) == (PROBLEMS[0].answer, 2)
        assert len(record["attempts"]) == 2


def test_options_that_the_server_refuses_end_the_start(
    client: NativeClient, tmp_path: Path
) -> None:
    options = Options(server={"keep_last_n_blocks": 1, "keep_last_block_for_answer": True})
    with pytest.raises(ConfigError, match="needs keep_last_n_blocks=0"):
        batch(client, rows(PROBLEMS), tmp_path / "a.jsonl", options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("one_call", [False, True])
def test_a_lost_server_stops_the_run(
    client: NativeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_call: bool
) -> None:
    out = tmp_path / "a.jsonl"
    send, left = httpx.Client.send, 12 if one_call else 70

    def lost(self: Any, request: Any, **options: Any) -> httpx.Response:
        nonlocal left
        left -= request.url.path == "/detokenize" or not one_call
        if left < 0:
            raise httpx.ReadError("connection reset")
        return send(self, request, **options)

    with monkeypatch.context() as patch:
        patch.setattr(httpx.Client, "send", lost)
        with pytest.raises(StoppedError, match="of 6 questions are done: give the same command"):
            batch(client, rows(PROBLEMS), out, concurrency=2, one_call=one_call)
    before = results(out)
    assert all(record["error"] is None for record in before.values())
    assert len(before) < 6
    assert batch(client, rows(PROBLEMS), out, one_call=one_call).earlier == len(before)
    assert [results(out)[str(n)]["answer"] for n in range(1, 7)] == [p.answer for p in PROBLEMS]


@pytest.mark.parametrize(("how", "flags"), [(signal.SIGINT, ()), (signal.SIGKILL, ("--one-call",))])
def test_a_command_that_is_ended_goes_on(
    server: Served, tmp_path: Path, how: signal.Signals, flags: tuple[str, ...]
) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    problems = held_out(8, sizes=(4, 24))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows(problems)))
    command = ["batch", str(questions), "--out", str(out), "--base-url", server.url, *flags]
    command += ["--temperature", "0", "--concurrency", "2"]
    program = [sys.executable, "-m", "memento_sgl.cli.app"]
    with subprocess.Popen([*program, *command], stderr=subprocess.PIPE, text=True) as process:
        while not out.exists() or not out.read_bytes():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        os.kill(process.pid, how)
        _, said = process.communicate()
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    if how is signal.SIGINT:
        assert "interrupted: give the same command to go on" in said
        server.assert_all_slots_free()  # its requests were ended
    before = results(out)
    assert 0 < len(before) < len(problems)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert f"8 of 8 answered, 0 failed, {len(before)} from earlier" in done.stderr
    after = results(out)
    assert [after[str(n)]["answer"] for n in range(1, 9)] == [p.answer for p in problems]
    assert before.items() <= after.items()


def test_the_command_says_what_is_wrong(server: Served, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"

    def said(url: str, *flags: str) -> tuple[int, str]:
        command = ["batch", str(questions), "--out", str(tmp_path / "a.jsonl"), "--base-url", url]
        done = CliRunner().invoke(app, [*command, *flags])
        return done.exit_code, done.stderr

    code, text = said(server.url)
    assert (code, "q.jsonl cannot be read: No such file" in text) == (2, True)
    questions.write_text('"What?"\n')
    code, text = said("http://127.0.0.1:9")
    assert (code, "no answer from http://127.0.0.1:9" in text) == (1, True)
    code, text = said(server.url, "--one-call", "--max-blocks", "2")
    assert (code, 'max_blocks needs constrain="strict"' in text) == (2, True)
    code, text = said(server.url, "--api-key-env", "NO_SUCH_KEY")
    assert (code, "NO_SUCH_KEY holds no API key" in text) == (2, True)
