"""Stream parser and `memento think` against the embedded model behind `memento serve`."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import Served
from memento_frontend import events as e
from memento_frontend.client import Client, Question
from memento_frontend.collect import collect
from memento_frontend.results import Reasoning
from memento_frontend.show import View
from memento_frontend.stream import GenerateParser, OpenAIParser, read
from memento_frontend.think import Exit, request_config, run

from memento_sgl.demo.task import held_out
from memento_sgl.rule.accounting import kv_curve
from memento_sgl.rule.machine import Eviction

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
PROBLEM = held_out(1, sizes=[6])[0]
MEMENTOS = re.findall(r"<\|summary_start\|>(.*?)<\|summary_end\|>", PROBLEM.output)
THINK = [sys.executable, "-m", "memento_sgl.cli.app", "think"]
SHOWN = {"custom_params": {"memento": {"show_markers": True}}}


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("demo", "demo", "--chat-template", "memento_nosys")


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"extra_body": SHOWN} | options
    return client.chat.completions.create(
        model="demo",
        messages=PROBLEM.messages,
        temperature=0,
        max_tokens=1000,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        **options,
    )


def check(reasoning: Reasoning) -> None:
    record = reasoning.accounting
    assert record is not None
    assert [block.memento for block in reasoning.blocks] == MEMENTOS
    assert [block.tokens for block in reasoning.blocks] == record["block_tokens"]
    assert [block.memento_tokens for block in reasoning.blocks] == record["summary_tokens"]
    assert reasoning.answer == PROBLEM.answer
    assert reasoning.unfinished == ""
    assert reasoning.finish_reason == "stop"
    assert reasoning.prompt_tokens is not None
    assert reasoning.output_tokens is not None
    total = reasoning.prompt_tokens + reasoning.output_tokens
    assert record["peak_kv_tokens_without"] == total - 1


@pytest.mark.parametrize("body", [SHOWN, {"separate_reasoning": False}], ids=["shown", "raw"])
def test_chat_stream(client: openai.OpenAI, body: dict[str, Any]) -> None:
    found = list(read(chat(client, extra_body=body), OpenAIParser()))
    reasoning = collect(found)
    check(reasoning)
    gone = [event for event in found if isinstance(event, e.BlockEvicted)]
    assert [event.number for event in gone] == list(range(6))
    assert [event.tokens for event in gone] == [block.tokens for block in reasoning.blocks]
    # What was known before the record came was right.
    for event in found:
        if isinstance(event, e.BlockClosed) and event.tokens is not None:
            assert event.tokens == reasoning.blocks[event.number].tokens


def test_the_stream_that_think_asks_for(server: Served) -> None:
    question = Question(PROBLEM.question, base_url=f"{server.url}/v1", temperature=0)
    check(collect(read(Client(question).stream(), OpenAIParser())))


async def test_several_choices_of_the_async_client(server: Served) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    parsers = [OpenAIParser(index=index) for index in range(2)]
    found: list[list[e.Event]] = [[], []]
    async for chunk in await chat(client, n=2):  # type: ignore[arg-type]
        for events, parser in zip(found, parsers, strict=True):
            events += parser.feed(chunk)
    for events, parser in zip(found, parsers, strict=True):
        check(collect(events + parser.finish()))


def prompt_of(server: Served) -> list[int]:
    text = server.tokenizer.apply_chat_template(
        PROBLEM.messages, add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = server.tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_completion_stream(server: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo",
        prompt=server.tokenizer.decode(prompt_of(server)),
        temperature=0,
        max_tokens=1000,
        stream=True,
        stream_options={"include_usage": True},
    )
    check(collect(read(stream, OpenAIParser())))


def native(server: Served, **options: Any) -> Iterator[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 1000, "custom_params": {"memento": options}}
    body = {"input_ids": prompt_of(server), "sampling_params": sampling, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_native_stream_tells_evictions_and_tokens_as_they_happen(server: Served) -> None:
    config = server.merged({"keep_last_n_blocks": 2})
    parser = GenerateParser(config, markers=server.markers)
    found = list(read(native(server, keep_last_n_blocks=2), parser))
    reasoning = collect(found)
    record = reasoning.accounting
    assert record is not None
    assert reasoning.output_ids is not None
    assert len(reasoning.output_ids) == reasoning.output_tokens
    closed = [event.tokens for event in found if isinstance(event, e.BlockClosed)]
    assert closed == record["block_tokens"]
    gone = [event.tokens for event in found if isinstance(event, e.BlockEvicted)]
    assert gone == [end - start for start, end in record["evicted_spans"]]
    assert isinstance(found[-2], e.AnswerText)  # nothing was left for the end


def test_think_asks_the_server_for_its_options(server: Served) -> None:
    question = Question("x", base_url=f"{server.url}/v1", memento={"keep_last_n_blocks": 3})
    told = Client(question).server_options()
    assert told is not None
    assert told.enable
    assert told.mask_delimiters is False
    merged = request_config(told, question)
    assert merged is not None
    assert merged.keep_last_n_blocks == 3


def think(server: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*THINK, PROBLEM.question, "--base-url", f"{server.url}/v1", "--temperature", "0"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_think_prints_json(server: Served) -> None:
    done = think(server, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    fields = json.loads(done.stdout)
    assert [block["memento"] for block in fields["blocks"]] == MEMENTOS
    record = fields["accounting"]
    spans = zip(record["evicted_spans"], record["eviction_points"], strict=True)
    evictions = [Eviction(point, start, end, point) for (start, end), point in spans]
    length = fields["prompt_tokens"] + fields["output_tokens"] - 1
    assert max(kv_curve(evictions, length)) == record["peak_kv_tokens"]
    kept = json.loads(think(server, "--json", "--keep-last-n-blocks", "-1").stdout)
    assert kept["accounting"]["evicted_spans"] == []
    cut = json.loads(think(server, "--json", "--max-tokens", "30").stdout)
    assert (cut["finish_reason"], cut["output_tokens"]) == ("length", 30)
    refused = think(server, "--json", "--max-tokens", "100000")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "refused (400)" in refused.stderr


def test_think_prints_lines_where_there_is_no_terminal(server: Served) -> None:
    done = think(server)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.partition("] ")[2] for line in lines if line.startswith("[memento")] == MEMENTOS
    assert lines[-3:-1] == [f"[answer] {PROBLEM.answer}", "[end] complete"]
    assert lines[-1].startswith("[KV tokens] 6 of 6 blocks evicted (")


def test_think_in_a_terminal(server: Served) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*THINK, PROBLEM.question, "--base-url", f"{server.url}/v1", "--temperature", "0"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(theirs)
    shown = b""
    while process.poll() is None or shown[-1:] != b"\n":
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"~\d+ now, peak ~\d+, without eviction \d+", text)  # while it ran
    last = text[text.rindex("╭") :]
    for number, memento in enumerate(MEMENTOS, start=1):
        assert re.search(rf"memento {number} .*evicted: {memento} ", last)
    assert PROBLEM.answer in last
    assert re.search(r" \d+ now, peak \d+, without eviction \d+", last)
    assert "6 of 6 blocks evicted" in last


def test_ctrl_c_leaves_one_json_object(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_self: View, event: e.Event, _gauge: object) -> None:
        if isinstance(event, e.MementoClosed) and event.number == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(View, "add", interrupt)
    question = Question(PROBLEM.question, base_url=f"{server.url}/v1", temperature=0)
    with redirect_stdout(io.StringIO()) as printed:
        assert run(question, as_json=True) is Exit.INTERRUPTED
    fields = json.loads(printed.getvalue())
    assert [block["memento"] for block in fields["blocks"]] == MEMENTOS[:2]
    assert (fields["finish_reason"], fields["accounting"]) == (None, None)
    assert fields["output_tokens"] > 0
    server.assert_all_slots_free()  # the server stopped too


TESTED = re.compile(r"<!-- tested -->\n```(bash|python)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["stream", "think"])
def test_the_pages_examples_work(server: Served, page: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    examples = TESTED.findall(text)
    assert len(examples) == 2
    for language, example in examples:
        local = example.replace("http://127.0.0.1:30000", server.url)
        if language == "bash":
            local = local.strip() + f" --base-url {server.url}/v1"
        command = [sys.executable, "-c", local] if language == "python" else ["sh", "-c", local]
        done = subprocess.run(
            command,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "b=22" in done.stdout
