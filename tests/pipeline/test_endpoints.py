"""Endpoints with real-world manners: what is asked again, what ends the run, and in which words."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import httpx
import pytest
from fault_server import HOPELESS, FaultServer
from memento_pipeline.cli import words
from memento_pipeline.llm.answers import parse_scores
from memento_pipeline.llm.client import UNUSABLE_AT_FIRST, Llm
from memento_pipeline.llm.endpoints import AskOptions
from memento_pipeline.llm.responses import Completion, Failure, Response, read
from memento_pipeline.llm.wire import Dialect
from memento_pipeline.run.convert import Exit, stopping
from memento_pipeline.run.runner import MOST_FAILED_IN_A_ROW
from rich.console import Console
from scenes import FAST as RUN_FAST
from scenes import options, run, serving, write_traces
from test_llm import FAST, at, complete, prompt

from memento_sgl.cli.app import app
from memento_sgl.errors import EndpointError, StoppedError


def response(body: object, status: int = 200, kind: str = "application/json") -> Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return Response(status, httpx.Headers({"content-type": kind}), content.encode())


def reply(**message: object) -> dict[str, object]:
    return {"choices": [{"message": message, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hello", "hello"),
        ([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "hello"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}], "hello"),
        (["hel", {"type": "output_text", "text": "lo"}, {"type": "image_url"}, 7], "hello"),
        (None, ""),
    ],
)
def test_content_may_be_text_or_parts(content: object, text: str) -> None:
    answer = read(response(reply(content=content)), "m", before=True)
    assert isinstance(answer, Completion)
    assert answer.text == text


@pytest.mark.parametrize(
    ("usage", "figures"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 3}, (5, 3, None)),
        ({"prompt_tokens": -5, "completion_tokens": 3}, (None, 3, None)),
        ({"prompt_tokens": "5", "completion_tokens": 3.0}, (None, 3, None)),
        ({"prompt_tokens": True, "completion_tokens": 10**40}, (None, None, None)),
        ([], (None, None, None)),
        ("much", (None, None, None)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}, (5, None, 4)),
        ({"prompt_tokens": 5, "prompt_tokens_details": None}, (5, None, None)),
        ({"prompt_tokens": 5, "prompt_cache_hit_tokens": 2}, (5, None, 2)),
        ({"prompt_tokens": 5, "cache_read_input_tokens": 1}, (5, None, 1)),
    ],
)
def test_a_bad_usage_figure_is_unknown_and_no_more(
    usage: object, figures: tuple[int | None, ...]
) -> None:
    answer = read(response(reply(content="hello") | {"usage": usage}), "m", before=True)
    assert isinstance(answer, Completion)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == figures


@pytest.mark.parametrize(
    ("body", "status", "kind", "what", "words"),
    [
        (
            {"error": {"message": "too long", "type": "invalid_request_error"}},
            200,
            "",
            "refused",
            "",
        ),
        ({"error": {"message": "too many", "code": 429}}, 200, "", "again", "too many"),
        ({"error": {"message": "no", "code": "invalid_api_key"}}, 200, "", "fatal", "no"),
        ({"error": {"message": "poor", "code": "insufficient_quota"}}, 200, "", "fatal", "poor"),
        ({"error": "upstream"}, 200, "", "again", "upstream"),
        ({"object": "error", "message": "too long", "code": 400}, 200, "", "refused", "too long"),
        ({"detail": "Not found"}, 422, "", "refused", "Not found"),
        ({"message": {"detail": [1]}}, 400, "", "refused", '{"detail": [1]}'),
        ("<html><h1>Sign in</h1></html>", 200, "text/html", "fatal", "Sign in"),
        ("OK", 200, "text/plain", "again", "OK"),
        ("", 200, "", "again", "it is empty"),
        ("<h1>Bad gateway</h1>", 502, "text/html", "again", "Bad gateway"),
        (
            'data: {"error": {"message": "out of memory"}}\n',
            200,
            "text/event-stream",
            "again",
            "out",
        ),
        (": ping\n\n", 200, "text/event-stream", "again", "not JSON"),
        ({"error": {"message": "x", "param": "temperature"}}, 400, "", "refused", "temperature"),
        ([], 200, "", "again", "[]"),
        (json.dumps({"choices": [{"message": "x" * 9000}]}), 200, "", "again", "..."),
    ],
)
def test_the_servers_words_are_kept(
    body: object, status: int, kind: str, what: str, words: str
) -> None:
    failure = read(response(body, status, kind), "m", before=False)
    assert isinstance(failure, Failure)
    assert (failure.what, words in failure.reason) == (what, True), failure
    assert len(failure.reason) < 600


def test_529_is_an_overload() -> None:
    failure = read(response({"error": {"type": "overloaded_error"}}, 529), "m", before=True)
    assert isinstance(failure, Failure)
    assert failure.overload


@pytest.mark.parametrize("kind", HOPELESS)
async def test_hopeless_endpoints_cost_few_calls_and_say_why(kind: str) -> None:
    fast = FAST.model_copy(update={"give_up_after": 0.2})
    async with FaultServer(always=kind) as server, Llm([at(server)], fast) as llm:
        results = await asyncio.gather(
            *(complete(llm, n) for n in range(8)), return_exceptions=True
        )
        expected = {
            "html": (1, "Welcome Please sign in"),
            "not-json": (UNUSABLE_AT_FIRST, "who are you"),
            "error-400": (8 * 2, "context of 4096 exceeded"),
            "error-429": (None, "busy"),
            "stream-error": (UNUSABLE_AT_FIRST, "out of memory"),
            "empty-stream": (UNUSABLE_AT_FIRST, "keep-alive"),
            "quota": (1, "quota or credit is used up"),
            "no-model": (1, "model name 'canned' is wrong"),
        }
        if kind in expected:
            calls, words = expected[kind]
            assert calls in (None, server.calls["all"])
            assert all(words in str(error) for error in results), results[0]
            assert not any("no key was sent" in str(error) for error in results)
        else:
            assert all(isinstance(answer, Completion) for answer in results)


REASONS = {
    "refusal": "score: the model refused: I cannot help with that.",
    "filtered": "score: the provider's content filter withheld the answer",
    "reasoned": "the model only reasoned: its answer is empty",
    "cut": "cut off by the token limit",
}


@pytest.mark.parametrize("kind", REASONS)
def test_answers_that_are_none_have_each_a_reason(kind: str, tmp_path: Path) -> None:
    traces = write_traces(tmp_path / "in.jsonl", 1)
    with serving(always=kind) as server:
        server.keep_prompts = True
        outcome = run(options(tmp_path / "out", traces, server.url))
        (reason,) = outcome.summary.reasons
        assert REASONS[kind] in reason
        calls = server.calls["all"]
        assert {"refusal": calls == 1, "filtered": calls == 1, "reasoned": calls == 5}.get(
            kind, True
        )
        if kind == "cut":
            assert "raise --max-tokens" in reason
            shown = [user.count("⟦") for user in server.users]
            assert shown == sorted(set(shown), reverse=True)  # never the same again
        # A retry asks anew: what was refused once is no answer for ever.
        server.settings.always = ""
        again = run(options(tmp_path / "out", traces, server.url), retry_failed=True)
        assert "failed" not in again.counts


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"limit_name": "max_completion_tokens"}, "takes max_completion_tokens"),
        ({"temperature": False}, "takes no temperature"),
        ({"schema": False}, "takes no response_format"),
    ],
)
async def test_an_endpoint_is_adapted_to_once(settings: dict[str, object], note: str) -> None:
    asked = FAST.model_copy(update={"max_tokens": 300, "temperature": 0.2})
    async with FaultServer(**settings) as server, Llm([at(server)], asked) as llm:
        await asyncio.gather(*(complete(llm, number) for number in range(12)))
    assert server.calls["all"] == 12 + 1
    assert [note in said for said in llm.notes] == [True]


async def test_several_manners_of_one_endpoint() -> None:
    asked = FAST.model_copy(update={"max_tokens": 300, "temperature": 0.2})
    strange = {"limit_name": "max_completion_tokens", "temperature": False, "schema": False}
    async with FaultServer(**strange) as server, Llm([at(server)], asked) as llm:
        await asyncio.gather(*(complete(llm, number) for number in range(12)))
    assert server.calls["all"] == 12 + 3
    assert len(llm.notes) == 3


def test_refusals_count_until_the_first_success(tmp_path: Path) -> None:
    traces = write_traces(tmp_path / "in.jsonl", 60, paragraphs=6)
    with serving(refuse="e") as server:
        outcome = run(options(tmp_path / "out", traces, server.url))
        assert outcome.exit is Exit.STOPPED
        assert f"{MOST_FAILED_IN_A_ROW} traces failed in a row" in str(outcome.summary.stopped)
        assert server.calls["all"] <= 2 * (MOST_FAILED_IN_A_ROW + RUN_FAST.concurrency)
    with serving(refuse="problem 7.") as server:
        outcome = run(options(tmp_path / "some", traces, server.url))
    assert outcome.summary.stopped is None
    assert outcome.counts["failed"] == 1


async def test_a_server_that_never_answered_is_dead_after_first_timeout() -> None:
    assert AskOptions().first_timeout <= 300 < AskOptions().timeout
    patient = FAST.model_copy(update={"timeout": 60.0, "first_timeout": 0.3})
    async with (
        FaultServer(faults={"hang": 1.0}, hang=60.0) as server,
        Llm([at(server)], patient) as llm,
    ):
        results = await asyncio.gather(
            *(complete(llm, n) for n in range(6)), return_exceptions=True
        )
    assert server.calls["all"] == 1
    assert {type(error) for error in results} == {EndpointError}
    assert "sent nothing within 0.3 s" in str(results[0])
    assert "--first-timeout" in str(results[0])


async def test_a_server_that_answered_before_keeps_its_timeout() -> None:
    patient = FAST.model_copy(update={"timeout": 20.0, "first_timeout": 0.2})
    async with FaultServer() as server, Llm([at(server)], patient) as llm:
        await complete(llm)
        server.settings.latency = 0.6
        await complete(llm, 1)
    assert server.calls["all"] == 2


async def test_a_slow_model_is_not_asked_the_same_again_and_again() -> None:
    slow = AskOptions(backoff=0.01, most_backoff=0.02, timeout=0.2, give_up_after=0.3)
    async with FaultServer() as server, Llm([at(server)], slow) as llm:
        await complete(llm)
        server.settings.latency = 5.0
        with pytest.raises(EndpointError, match="although nothing else was in flight"):
            await complete(llm, 1)
        assert server.calls["all"] == 1 + 2
        with pytest.raises((StoppedError, EndpointError)):
            await complete(llm, 2)
        assert "is too slow: 3 requests in a row, each alone" in str(llm.stopped)
        assert "--timeout" in str(llm.stopped)


async def test_a_full_server_is_given_less_and_not_taken_for_a_slow_one() -> None:
    """Two places, the rest waits in the server's own queue, as vLLM and SGLang do."""
    places = asyncio.Semaphore(2)

    class Queueing(FaultServer):
        async def _complete(self, *request: object) -> bool:  # type: ignore[override]
            async with places:
                return await super()._complete(*request)  # type: ignore[arg-type]

    wide = AskOptions(backoff=0.01, most_backoff=0.05, timeout=1.5, concurrency=64)
    async with Queueing(latency=0.2) as server, Llm([at(server)], wide) as llm:
        await asyncio.gather(*(complete(llm, number) for number in range(40)))
    assert llm.stopped is None
    assert llm.retries == 0
    assert server.peak < 16


def test_limits_of_ours_follow_the_question_where_the_model_does_not_reason() -> None:
    dialect, asked = Dialect(schemas=True), prompt(limit=77)

    def limit(options: AskOptions = FAST, allowed: bool = True) -> object:
        return dialect.body(asked, "m", options, schema=True, limit=allowed).get("max_tokens")

    assert limit() is None  # nobody knows yet
    dialect.limits = True
    assert limit() == 77
    assert limit(allowed=False) is None
    assert limit(AskOptions(max_tokens=500)) == 500
    assert limit(AskOptions(extra_body={"max_completion_tokens": 9})) is None


@pytest.mark.parametrize(
    ("message", "usage", "reasons"),
    [
        ({"content": "x"}, {}, False),
        ({"content": "x", "reasoning_content": "hm"}, {}, True),
        ({"content": "x", "reasoning": "hm"}, {}, True),
        ({"content": "<think>hm</think>x"}, {}, True),
        ({"content": "hm</think>x"}, {}, True),
        ({"content": "x"}, {"completion_tokens_details": {"reasoning_tokens": 40}}, True),
        ({"content": "x"}, {"completion_tokens_details": {"reasoning_tokens": 0}}, False),
    ],
)
def test_a_model_that_reasons_is_known_by_its_answer(
    message: dict[str, object], usage: dict[str, object], reasons: bool
) -> None:
    answer = read(response(reply(**message) | {"usage": usage}), "m", before=True)
    assert isinstance(answer, Completion)
    assert answer.reasoned is reasons


async def test_a_limit_that_an_endpoint_refuses_is_left_out() -> None:
    async with FaultServer() as server, Llm([at(server)], FAST) as llm:
        server.keep_prompts = True
        for number in range(2):
            await llm.complete(prompt(number, limit=50), f"k{number}")
        assert [body.get("max_tokens") for body in server.bodies] == [None, 50]
        server.settings.limit_name = "neither"
        answer = await llm.complete(prompt(3, limit=50), "k3")
    assert parse_scores(answer.text, [1, 2]).items


def test_ctrl_c_says_how_long_the_end_takes_and_what_a_second_one_does() -> None:
    assert "3 answers are in flight and awaited, for 6m40s at most (--timeout)" in stopping(3, 400)
    assert "lost and asked, and maybe paid, again" in stopping(1, 5)
    assert "no answer is in flight" in stopping(0, 0)


async def test_requests_in_flight_are_counted_with_their_deadline() -> None:
    long = FAST.model_copy(update={"timeout": 40.0})
    async with FaultServer(latency=0.5) as server, Llm([at(server)], long) as llm:
        task = asyncio.create_task(complete(llm))
        while not server.in_flight:
            await asyncio.sleep(0.01)
        count, seconds = llm.in_flight()
        assert count == 1
        assert 30 < seconds <= 40
        await task
        assert llm.in_flight() == (0, 0.0)


def test_hints_of_a_server_are_shown_whole(tmp_path: Path) -> None:
    traces = write_traces(tmp_path / "in.jsonl", 2)
    with serving(refuse="e") as server:
        outcome = run(options(tmp_path / "out", traces, server.url))
    hint = "x" * 400
    outcome.summary.reasons[hint] = 1
    console = Console(record=True, width=2000, file=io.StringIO())
    words.summary(console, outcome._replace(notes=("http://x takes no temperature",)), tmp_path)
    said = console.export_text()
    assert hint in said
    assert "note: http://x takes no temperature" in said


def test_quiet_still_says_why_a_run_stopped(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    traces = write_traces(tmp_path / "in.jsonl", 1)
    with serving(key="another") as server:
        arguments = ["convert", traces, "--out", tmp_path / "out", "--quiet", "--model", "m"]
        arguments += ["--base-url", server.url]
        said = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert said.exit_code == Exit.STOPPED
    words = " ".join(said.stderr.split())
    assert words.startswith("error")
    assert "HTTP 401" in words
