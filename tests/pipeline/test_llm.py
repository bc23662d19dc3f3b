"""The client against a real server: what is retried, what stops the run, what is never printed."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest
from fault_server import TRANSPORT_FAULTS, FaultServer, spread
from memento_pipeline.llm import rate as limits
from memento_pipeline.llm.answers import parse_scores, scores_schema
from memento_pipeline.llm.asking import ask_items
from memento_pipeline.llm.client import Llm
from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.llm.paid import Answer, Meter, PaidLlm, all_done
from memento_pipeline.llm.rate import START, RateLimit, Slot, Slots, backoff, retry_after
from memento_pipeline.llm.wire import Completion, Prompt
from memento_pipeline.store.folder import Store

from memento_sgl.errors import (
    AnswerError,
    ConfigError,
    EndpointError,
    RefusedError,
    StoppedError,
)

FAST = AskOptions(backoff=0.01, most_backoff=0.05, timeout=0.3, concurrency=16)


def prompt(number: int = 0, **changes: object) -> Prompt:
    excerpt = f"first ⟦1⟧ second ⟦2⟧ third number {number}."
    user = f"<excerpt-00>\n{excerpt}\n</excerpt-00>\n\nGrade the cuts 1, 2"
    return Prompt("trace", "score", "system", user, scores_schema([1, 2]))._replace(**changes)


def at(server: FaultServer, **changes: object) -> Endpoint:
    return Endpoint(url=server.url, model="canned").model_copy(update=changes)


async def complete(llm: Llm, number: int = 0) -> Completion:
    return await llm.complete(prompt(number), f"key-{number}")


@pytest.mark.parametrize("kind", TRANSPORT_FAULTS)
async def test_every_transport_fault_is_retried(kind: str) -> None:
    async with FaultServer(faults={kind: 0.5}, hang=1.0) as server, Llm([at(server)], FAST) as llm:
        answers = await asyncio.gather(*(complete(llm, number) for number in range(24)))
    assert server.struck[kind] > 3
    assert all(parse_scores(answer.text, [1, 2]).items for answer in answers)
    assert max(server.by_key.values()) == 1


async def test_a_key_that_is_refused_costs_one_call_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    caplog.set_level(logging.DEBUG)
    async with (
        FaultServer(key="another") as server,
        Llm([at(server, key_env="MY_KEY")], FAST) as llm,
    ):
        results = await asyncio.gather(
            *(complete(llm, number) for number in range(40)), return_exceptions=True
        )
    assert server.calls["all"] == 1
    assert all(isinstance(error, EndpointError) for error in results)
    assert "MY_KEY" in str(results[0])
    assert "HTTP 401" in str(results[0])
    assert "sk-very-secret" not in str(results) + caplog.text


async def test_no_key_names_the_variable_to_set() -> None:
    async with FaultServer(key="some") as server, Llm([at(server)], FAST) as llm:
        with pytest.raises(EndpointError, match="set the environment variable MEMENTO_API_KEY"):
            await complete(llm)


async def test_a_wrong_address_costs_one_call() -> None:
    async with FaultServer(path="/v2/chat/completions") as server, Llm([at(server)], FAST) as llm:
        with pytest.raises(EndpointError, match="HTTP 404"):
            await complete(llm)
        with pytest.raises(EndpointError, match="HTTP 404"):
            await complete(llm, 1)
    assert server.calls["all"] == 1


def test_a_named_variable_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MISSING_KEY", raising=False)
    with pytest.raises(ConfigError, match="MISSING_KEY"):
        Llm([Endpoint(url="http://127.0.0.1:9/v1", key_env="MISSING_KEY", model="m")], FAST)


async def test_one_refused_request_leaves_the_others_alone() -> None:
    async with FaultServer(refuse="number 3.") as server, Llm([at(server)], FAST) as llm:
        results = await asyncio.gather(
            *(complete(llm, number) for number in range(8)), return_exceptions=True
        )
    assert [type(result) for result in results].count(Completion) == 7
    assert isinstance(results[3], RefusedError)
    assert "maximum context length" in str(results[3])


async def test_an_endpoint_without_response_format_is_found_out() -> None:
    async with FaultServer(schema=False) as server, Llm([at(server)], FAST) as llm:
        await asyncio.gather(*(complete(llm, number) for number in range(20)))
        before = server.calls["all"]
        await complete(llm, 99)
    assert server.calls["all"] == before + 1


async def test_an_endpoint_that_goes_down_stops_the_run() -> None:
    options = FAST.model_copy(update={"give_up_after": 0.5, "retries": 100})
    server = FaultServer()
    async with AsyncExitStack() as running:
        await running.enter_async_context(server)
        async with Llm([at(server)], options) as llm:
            await complete(llm)
            await running.aclose()
            with pytest.raises(StoppedError, match=r"is down or overloaded.*failures in a row"):
                await complete(llm, 1)
    assert isinstance(llm.stopped, StoppedError)


async def test_an_endpoint_that_was_never_reached_stops_the_run_at_once() -> None:
    async with Llm([Endpoint(url="http://127.0.0.1:9/v1", model="m")], FAST) as llm:
        results = await asyncio.gather(
            *(complete(llm, number) for number in range(20)), return_exceptions=True
        )
    assert {type(error) for error in results} == {EndpointError}
    assert "127.0.0.1:9/v1 cannot be reached" in str(results[0])
    assert llm.retries == 0


async def test_retries_end() -> None:
    options = FAST.model_copy(update={"retries": 2})
    async with FaultServer(faults={"500": 1.0}) as server, Llm([at(server)], options) as llm:
        with pytest.raises(EndpointError, match=r"no answer in 3 tries.*HTTP 500"):
            await complete(llm)
    assert server.calls["all"] == 3


async def test_too_long_a_wait_stops_the_run() -> None:
    async with (
        FaultServer(faults={"429-after": 1.0}, retry_after=7200) as server,
        Llm([at(server)], FAST) as llm,
    ):
        with pytest.raises(StoppedError, match="asks to wait 7200 s"):
            await complete(llm)


async def test_retry_after_is_kept() -> None:
    async with (
        FaultServer(faults={"429-after": 0.5}, retry_after=0.4) as server,
        Llm([at(server)], FAST) as llm,
    ):
        answers = await asyncio.gather(*(complete(llm, number) for number in range(8)))
        assert len(answers) == 8
        starts = [moment for moment, level in server.level]
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) >= 0.39


def test_retry_after_header() -> None:
    assert retry_after("7") == 7
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert 8 < (retry_after(formatdate(time.time() + 10, usegmt=True)) or 0) <= 10
    assert retry_after(formatdate(time.time() - 10, usegmt=True)) == 0


def test_backoff_doubles_with_jitter_and_ends() -> None:
    for failures, most in ((1, 0.5), (3, 2.0), (50, 30.0)):
        waits = [backoff(failures, 0.5, 30.0) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most


async def test_overload_lowers_concurrency_and_success_raises_it() -> None:
    options = FAST.model_copy(update={"concurrency": 32, "timeout": 5.0})
    async with (
        FaultServer(capacity=8, latency=0.02, retry_after=0.02) as server,
        Llm([at(server)], options) as llm,
    ):
        await asyncio.gather(*(complete(llm, number) for number in range(300)))
        refused = server.calls["all"] - 300
    assert refused < 150
    slot = Slot(8)
    slot.overloaded(sent=0.0, now=1.0)
    slot.overloaded(sent=0.5, now=1.5)  # the same burst: sent before the first cut
    assert slot.limit == START / 2
    for _ in range(40):
        slot.succeeded()
    assert slot.limit == 8


def test_an_endpoint_starts_with_few_requests_and_is_given_no_more_than_it_does_in_time() -> None:
    slot = Slot(64)
    assert slot.room(0.0)
    slot.in_flight = 1
    assert not slot.room(0.0)  # one alone, until it has answered
    slot.succeeded(0.01)
    assert slot.limit == START + 2
    for _ in range(29):
        slot.succeeded(0.01)
    assert slot.limit == 64  # quick answers: soon all
    waiting = Slot(64)
    for _ in range(100):
        waiting.succeeded(0.4)  # old answers: they stood in the server's own queue
    assert waiting.limit == START


async def test_several_endpoints_share_the_work() -> None:
    async with FaultServer(latency=0.02) as one, FaultServer(latency=0.02) as two:
        async with Llm([at(one), at(two)], FAST) as llm:
            await asyncio.gather(*(complete(llm, number) for number in range(60)))
        assert min(one.calls["all"], two.calls["all"]) > 15
        assert max(one.peak, two.peak) <= FAST.concurrency


async def test_work_moves_away_from_an_endpoint_that_dies() -> None:
    options = FAST.model_copy(update={"retries": 3, "backoff": 0.05, "most_backoff": 1.0})
    async with FaultServer(latency=0.05) as alive, AsyncExitStack() as running:
        dying = await running.enter_async_context(FaultServer())
        async with Llm([at(dying), at(alive)], options) as llm:
            await asyncio.gather(*(complete(llm, number) for number in range(20)))
            assert dying.calls["all"] > 0
            await running.aclose()
            await asyncio.gather(*(complete(llm, number) for number in range(20, 220)))
    assert llm.retries < 60


async def test_rates_per_minute_hold() -> None:
    options = FAST.model_copy(update={"requests_per_minute": 600.0})
    started = time.monotonic()
    async with FaultServer() as server, Llm([at(server)], options) as llm:
        await asyncio.gather(*(complete(llm, number) for number in range(25)))
    # A bucket of ten at once, then just under ten a second.
    assert 1.4 < time.monotonic() - started < 4


async def test_a_rate_limit_never_exceeds_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: now)

    async def sleep(ended: asyncio.Event, seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(limits, "sleep_until", sleep)
    limit, spent = RateLimit(per_minute=120), []
    for _ in range(500):
        await limit.acquire()
        spent.append(now)
    for first in range(400):
        assert sum(1 for moment in spent if spent[first] <= moment < spent[first] + 60) <= 120
    assert spent[-1] < 500 / 120 * 60 * 1.05


async def test_cancelled_waits_give_their_place_back() -> None:
    slots = Slots([Slot(1)], 1)
    assert await slots.acquire() == 0
    waiting = [asyncio.create_task(slots.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    slots.release(0)
    waiting[1].cancel()  # served and cancelled in the same moment
    await asyncio.wait(waiting, timeout=1)
    assert waiting[2].done()


@pytest.mark.parametrize("start", [0.55, 0.65, 0.75, 0.85, 0.95])
def test_a_pause_that_ends_between_two_readings_of_the_clock_wakes_who_waits(
    monkeypatch: pytest.MonkeyPatch, start: float
) -> None:
    now = start

    def clock() -> float:
        nonlocal now
        now += 0.1
        return now

    async def wait() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
        slot = Slot(1)
        slot.pause(1.1)
        waiting = asyncio.create_task(Slots([slot], 1).acquire())
        for _ in range(20):
            await asyncio.sleep(0)
        assert waiting.done()

    # asyncio's own loop: SGLang, once imported, makes uvloop's the default, which reads no `time`
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(wait())


async def test_a_timer_that_comes_a_tick_early_is_set_again() -> None:
    now, readings = 0.0, 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        return now

    slot = Slot(1)
    slot.pause(1e-3)
    waiting = asyncio.create_task(Slots([slot], 1, clock).acquire())
    while readings < 5:  # the loop's own clock goes on: its timers come long before this one's end
        await asyncio.sleep(0.001)
    assert not waiting.done()
    now = 1e-3
    assert await waiting == 0


async def test_a_wait_that_ended_with_an_error_can_be_cancelled() -> None:
    slots = Slots([Slot(1)], 1)
    assert await slots.acquire() == 0
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    slots.fail_waiting(StoppedError("enough"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_stopping_ends_waits_for_a_rate() -> None:
    options = FAST.model_copy(update={"requests_per_minute": 0.1})
    async with FaultServer() as server, Llm([at(server)], options) as llm:
        await complete(llm)
        tasks = [asyncio.create_task(complete(llm, number)) for number in range(1, 9)]
        await asyncio.sleep(0.05)
        llm.stop(StoppedError("enough"))
        async with asyncio.timeout(30):
            results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {StoppedError}


async def test_an_answer_is_paid_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        async with FaultServer(latency=0.02) as server, Llm([at(server)], FAST) as llm:
            paid = PaidLlm(store, llm, [at(server)], FAST)
            meters = [Meter(), Meter(), Meter()]
            await asyncio.gather(paid.ask(prompt(), meters[0]), paid.ask(prompt(), meters[1]))
            await paid.ask(prompt(trace_id="other"), meters[2])
            assert server.calls["all"] == 1
            await paid.ask(prompt(attempt=1), Meter())
            assert server.calls["all"] == 2
    assert meters[0].usage.calls == 1
    assert (meters[2].usage.calls, meters[2].usage.cached_calls) == (0, 1)
    with Store(tmp_path) as store:
        async with Llm([Endpoint(url="http://127.0.0.1:9/v1", model="canned")], FAST) as llm:
            paid = PaidLlm(store, llm, [at(server)], FAST)
            assert not (await paid.ask(prompt(), Meter())).fresh


async def test_a_task_that_stayed_in_the_books_is_not_awaited_for_ever() -> None:
    """Ctrl-C in the middle of the callback that takes a finished task out: `convert` span."""

    async def work() -> None:
        await asyncio.sleep(0.01)

    ended, running = asyncio.create_task(work()), asyncio.create_task(work())
    await ended
    tasks = {ended, running}
    await asyncio.wait_for(all_done(tasks), timeout=10)
    assert running.done()


async def test_unknown_usage_stays_unknown(tmp_path: Path) -> None:
    options = FAST.model_copy(update={"price_in": 1.0, "price_out": 2.0})
    with Store(tmp_path) as store:
        async with FaultServer(usage=False) as server, Llm([at(server)], options) as llm:
            meter = Meter()
            await PaidLlm(store, llm, [at(server)], options).ask(prompt(), meter)
        assert meter.usage.prompt_tokens is None
        assert meter.usage.dollars is None
        assert store.spent().unknown == 1


async def test_a_budget_stops_before_it_is_exceeded(tmp_path: Path) -> None:
    prices = {"price_in": 10.0, "price_out": 10.0, "budget": 0.1}
    options = FAST.model_copy(update={**prices, "max_tokens": 100, "timeout": 60.0})
    prompts = [prompt(number) for number in range(400)]
    with Store(tmp_path) as store:
        async with FaultServer(latency=0.01) as server, Llm([at(server)], options) as llm:
            paid = PaidLlm(store, llm, [at(server)], options)
            results = await asyncio.gather(
                *(paid.ask(each, Meter()) for each in prompts), return_exceptions=True
            )
        spent = store.spent()
        next_call = options.dollars(len(prompts[0].system + prompts[0].user) // 3, 100)
        assert next_call is not None
        assert 0.1 - next_call < spent.dollars <= 0.1  # used up, not only reserved
        stopped = [result for result in results if isinstance(result, StoppedError)]
        answers = [result for result in results if isinstance(result, Answer)]
        assert len(answers) == spent.answers == server.answered.total() < len(prompts)
        assert len(stopped) == len(prompts) - len(answers)  # no other error
        assert "--budget" in str(stopped[0])
        with pytest.raises(ConfigError, match="--price-in"):
            PaidLlm(store, llm, [], AskOptions(budget=1.0))


async def test_stopping_ends_waits_but_not_calls_in_flight() -> None:
    options = FAST.model_copy(update={"concurrency": 2, "timeout": 5.0})
    async with FaultServer(latency=0.1) as server, Llm([at(server)], options) as llm:
        await complete(llm, 99)
        tasks = [asyncio.create_task(complete(llm, number)) for number in range(6)]
        await asyncio.sleep(0.05)
        llm.stop(StoppedError("enough"))
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, Completion) for result in results] == [True] * 2 + [False] * 4


async def test_only_missing_items_are_asked_again(tmp_path: Path) -> None:
    asked: list[list[int]] = []
    later: dict[str, float] = {}

    def make(items: object, note: str, attempt: int) -> Prompt:
        if asked:
            server.settings.faults = later
        asked.append(list(items))  # type: ignore[call-overload]
        marks = " ".join(f"w{item} ⟦{item}⟧" for item in asked[-1])
        return prompt(user=f"{marks} end\nGrade the cuts {note}", attempt=attempt)

    async def run(server: FaultServer, tries: int = 5) -> dict[int, tuple[int, str]]:
        async with Llm([at(server)], FAST) as llm:
            paid = PaidLlm(store, llm, [at(server)], FAST)
            return await ask_items(paid, Meter(), [1, 2, 3, 4], make, parse_scores, tries=tries)

    with Store(tmp_path / "a") as store:
        async with FaultServer(faults={"nan": 1.0}) as server:
            found = await run(server)
    assert sorted(found) == [1, 2, 3, 4]
    assert asked == [[1, 2, 3, 4], [1]]
    with Store(tmp_path / "b") as store:
        asked.clear()
        later["empty"] = 1.0
        async with FaultServer(faults={"empty": 1.0}) as server:
            with pytest.raises(AnswerError, match=r"no usable answer in 3 tries.*empty"):
                await run(server, tries=3)
        assert len(asked) == 3
        # A later run reads the useless answers for free and asks on.
        asked.clear()
        later.clear()
        async with FaultServer() as server:
            assert len(await run(server, tries=3)) == 4
            assert (len(asked), server.calls["all"]) == (4, 1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("ftp://x,,m", "http"),
        ("http://user:pw@x/v1,,m", "no user name, password"),
        ("http://x/v1?key=1,,m", "no user name, password"),
        ("http://x/v1,sk-abc,m", "NAME of an environment variable"),
        ("http://x/v1", "has no model"),
        ("http://x/v1,A,m,z", "url,key-env,model"),
    ],
)
def test_bad_endpoints(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Endpoint.parse(text, None)


def test_endpoints_are_read() -> None:
    endpoint = Endpoint.parse("https://h/v1/chat/completions,K,m", "other")
    assert (endpoint.url, endpoint.key_env, endpoint.model) == ("https://h/v1", "K", "m")
    assert Endpoint.parse("http://127.0.0.1:1/v1/", "other").model == "other"


def test_spread_adds_up() -> None:
    assert sum(spread(0.3).values()) == pytest.approx(0.3)
