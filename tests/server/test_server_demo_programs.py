"""Programs call by call, and the same from one call, against the requests that they stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Served

pytest.importorskip("sglang")

import sglang as sgl
from memento_frontend.endpoint import MementoEndpoint
from memento_frontend.events import BlockClosed, Done
from memento_frontend.native import NativeClient, Output
from memento_frontend.one_call import check_one_call, reason_in_one_call
from memento_frontend.options import Options, Sampling
from memento_frontend.programs import reason, vote
from memento_frontend.results import Reasoning

from memento_sgl.demo.task import held_out
from memento_sgl.errors import ConfigError, EndpointError, RefusedError
from memento_sgl.rule.accounting import account

pytestmark = pytest.mark.server

SMALL, MIDDLE, LARGE = held_out(3, sizes=(3, 5, 10))
HISTORY = [
    *SMALL.messages,
    {"role": "assistant", "content": SMALL.output},
    *MIDDLE.messages,
]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("demo", "demo", "--chat-template", "memento_nosys")


@pytest.fixture(scope="module")
def client(server: Served) -> NativeClient:
    return NativeClient(f"{server.url}/v1")


@pytest.fixture(scope="module")
def endpoint(client: NativeClient) -> MementoEndpoint:
    return MementoEndpoint(client=client)


def run(endpoint: MementoEndpoint, question: Any, options: Options, **sampling: Any) -> Any:
    """The program's state; its result is `ret_value`."""
    return reason.run(question, options, backend=endpoint, **sampling)


def record(accounting: dict[str, Any] | None) -> dict[str, Any]:
    """Without what the engine measured: it counts a step in flight or not."""
    assert accounting is not None
    return {name: value for name, value in accounting.items() if not name.startswith("measured")}


def request(
    server: Served, client: NativeClient, question: Any, tokens: int, **options: Any
) -> Any:
    ids = client.encode_chat(question)
    return ids, server.generate(ids, tokens, ignore_eos=False, **options)


@pytest.mark.parametrize("problem", [SMALL, MIDDLE, LARGE], ids=["small", "middle", "large"])
def test_all_ways_give_the_same_tokens_and_accounting(
    server: Served, client: NativeClient, endpoint: MementoEndpoint, problem: Any
) -> None:
    ids, answer = request(server, client, problem.question, 2000)
    by_step = run(endpoint, problem.question, Options.greedy()).ret_value
    in_one = reason_in_one_call(client, problem.question, Options.greedy())
    for found in (by_step, in_one):
        assert found.output_ids == tuple(answer["output_ids"])
        assert found.answer == problem.answer
        assert len(found.blocks) == len(problem.groups)
        assert found.finish_reason == "stop"
        assert found.unfinished == ""
        assert record(found.accounting) == record(answer["meta_info"]["memento"])
    assert by_step.blocks == in_one.blocks
    assert [b.memento for b in by_step.blocks] == [
        f"{label}={total:02d}"
        for label, total in zip("abcdefghijklmn", problem.totals, strict=False)
    ]
    assert server.verify(ids, answer) == len(problem.groups)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (Options.greedy(max_block_tokens=12, max_summary_tokens=3, max_tokens=400), {}),
        (Options.greedy(server={"keep_last_n_blocks": 1}), {"keep_last_n_blocks": 1}),
        (
            Options.greedy(server={"keep_last_block_for_answer": True}),
            {"keep_last_block_for_answer": True},
        ),
        (Options.greedy(server={"enable": False}), {"enable": False}),
        (Options.greedy(max_tokens=75), {}),
        (Options.greedy(constrain="strict", max_blocks=2, max_block_tokens=15, max_tokens=300), {}),
    ],
    ids=["caps", "keep one", "keep for answer", "off", "cut off", "strict"],
)
def test_options_mean_the_same_in_every_way_of_asking(
    server: Served,
    client: NativeClient,
    endpoint: MementoEndpoint,
    options: Options,
    names: dict[str, Any],
) -> None:
    assert options.server == names
    _, answer = request(
        server, client, MIDDLE.question, min(options.max_tokens, 2000), **options.request()
    )
    found = run(endpoint, MIDDLE.question, options).ret_value
    assert found.output_ids == tuple(answer["output_ids"])
    assert found.finish_reason == answer["meta_info"]["finish_reason"]["type"]
    if options.server.get("enable") is False:
        assert found.accounting is None
    else:
        assert record(found.accounting) == record(answer["meta_info"]["memento"])
    one = reason_in_one_call(client, MIDDLE.question, options)
    assert (one.output_ids, one.blocks, one.answer) == (
        found.output_ids, found.blocks, found.answer
    )  # fmt: skip


def test_strict_drives_a_model_where_it_would_not_go(
    client: NativeClient, endpoint: MementoEndpoint
) -> None:
    options = Options.greedy(
        constrain="strict", max_blocks=3, max_block_tokens=20, max_summary_tokens=6,
        server={"min_blocks": 3}, regex="yes|no",
    )  # fmt: skip
    found = run(endpoint, "Is this a sum?", options).ret_value
    assert found.answer in ("yes", "no")
    assert len(found.blocks) == 3
    assert found.accounting["blocks"] == 3


def test_history_with_finished_blocks(
    server: Served, client: NativeClient, endpoint: MementoEndpoint
) -> None:
    _, answer = request(server, client, HISTORY, 2000)
    found = run(endpoint, HISTORY, Options.greedy()).ret_value
    assert found.output_ids == tuple(answer["output_ids"])
    assert record(found.accounting) == record(answer["meta_info"]["memento"])
    assert found.accounting["blocks"] == len(found.blocks) + len(SMALL.groups)


def test_each_call_reads_only_what_is_new(server: Served, endpoint: MementoEndpoint) -> None:
    server.post("/flush_cache")
    state = run(endpoint, LARGE.question, Options.greedy())
    calls = list(state.stream_executor.meta_info.values())
    assert len(calls) == 3 * len(LARGE.groups) + 2
    for before, call in itertools.pairwise(calls):
        # The last token of an answer is never read, so the next call has to.
        assert call["cached_tokens"] == before["prompt_tokens"] + before["completion_tokens"] - 1
    server.assert_all_slots_free()


def test_the_program_ends_the_thought_after_max_blocks(
    server: Served, endpoint: MementoEndpoint
) -> None:
    found: Reasoning = run(endpoint, MIDDLE.question, Options.greedy(max_blocks=2)).ret_value
    assert len(found.blocks) == 2
    assert found.answer == f"The total is {MIDDLE.totals[1]:02d}."
    assert found.output_ids is not None
    ids = endpoint.client.encode_chat(MIDDLE.question)
    machine = server.machine(ids, list(found.output_ids))
    expected = account(machine, len(ids), len(ids) + len(found.output_ids)).as_dict()
    assert record(found.accounting) == json.loads(json.dumps(expected))


def test_the_answer_keeps_to_a_shape(client: NativeClient, endpoint: MementoEndpoint) -> None:
    found = run(endpoint, SMALL.question, Options.greedy(regex=r"\{\"total\": \d\d\}")).ret_value
    assert json.loads(found.answer) == {"total": SMALL.totals[-1]}
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    schema["additionalProperties"] = False
    found = run(
        endpoint, SMALL.question, Options.greedy(json_schema=schema, max_answer_tokens=60)
    ).ret_value
    assert isinstance(json.loads(found.answer)["sure"], bool)
    assert len(found.blocks) == len(SMALL.groups)
    whole = reason_in_one_call(client, SMALL.question, Options.greedy(regex=r"\{\"total\": \d\d\}"))
    assert json.loads(whole.answer) == {"total": SMALL.totals[-1]}
    assert len(whole.blocks) == len(SMALL.groups)


def test_a_shape_in_one_call_needs_a_reasoning_parser() -> None:
    client: Any = SimpleNamespace(info=lambda: {"reasoning_parser": None})
    with pytest.raises(ConfigError, match="reasoning-parser"):
        check_one_call(client, Options.greedy(regex="a"))


def test_a_vote_over_forks(endpoint: MementoEndpoint) -> None:
    state = vote.run(
        SMALL.question, 3, Options(answer=Sampling(temperature=1.0)), temperature=0.0,
        backend=endpoint,
    )  # fmt: skip
    found = state.ret_value
    assert len(found.attempts) == 3
    assert found.answer in {attempt.answer for attempt in found.attempts}
    assert found.votes >= 1
    # `run(temperature=0)` holds for the thought: all blocks are equal.
    assert len({attempt.blocks for attempt in found.attempts}) == 1
    assert len(found.attempts[0].blocks) == len(SMALL.groups)


def test_a_program_of_ones_own_with_select(
    server: Served, client: NativeClient, endpoint: MementoEndpoint
) -> None:
    """`select` between single tokens takes what greedy sampling takes."""
    markers = client.markers

    @sgl.function  # type: ignore[untyped-decorator]
    def own(s: Any, question: str) -> int:
        endpoint.begin(s, question)
        s += "<think>\n"
        blocks = 0
        while True:
            s += sgl.select("next", ["</think>", "<|block_start|>"])
            if s["next"] == "</think>":
                break
            s += sgl.gen("block", max_tokens=300, stop_token_ids=[markers.block_end])
            s += sgl.gen("memento", max_tokens=100, stop_token_ids=[markers.summary_end])
            s += "\n"
            blocks += 1
        s += sgl.gen("answer", max_tokens=50)
        return blocks

    ids, answer = request(server, client, SMALL.question, 900)
    state = own.run(SMALL.question, temperature=0, backend=endpoint, use_thread=False)
    assert state.ret_value == len(SMALL.groups)
    assert list(endpoint.ids(state)) == ids + answer["output_ids"][:-1]  # no end of sequence
    assert state.text().endswith(f"</think>\n{SMALL.answer}")
    assert state["block"].endswith("<|block_end|>")


def test_text_without_chat_markup(client: NativeClient, endpoint: MementoEndpoint) -> None:
    """Markers count from where the program first generates; stop strings are cut off."""

    @sgl.function  # type: ignore[untyped-decorator]
    def plain(s: Any) -> None:
        s += "<|block_start|>x<|block_end|><|summary_start|>y<|summary_end|>"  # not the model's
        s += sgl.gen("number", max_tokens=8, regex="1234", stop="3") + "3 "
        s += "<|block_start|>abc<|block_end|><|summary_start|>a<|summary_end|>"
        s += sgl.gen("rest", max_tokens=2)

    state = plain.run(temperature=0, backend=endpoint, use_thread=False)
    assert state["number"] == "12"
    assert "123 <|block_start|>" in state.text()
    assert client.decode(endpoint.ids(state)) == [state.text()]
    assert state.get_meta_info("rest")["memento"]["block_tokens"] == [3]


def test_what_was_generated_goes_back_as_it_was(
    client: NativeClient, endpoint: MementoEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four letters that the tokenizer would read as one token stay four."""
    letters = [client.encode(letter)[0] for letter in "user"]
    assert client.encode("user") != letters
    sent: list[tuple[int, ...]] = []

    def generate(ids: Any, *_: Any, **__: Any) -> Output:
        sent.append(tuple(ids))
        meta = {"finish_reason": {"type": "length"}, "memento": None}
        return Output(tuple(letters), "user", meta)

    monkeypatch.setattr(client, "generate", generate)

    @sgl.function  # type: ignore[untyped-decorator]
    def twice(s: Any) -> None:
        s += "a" + sgl.gen("one") + "b" + sgl.gen("two")

    assert twice.run(backend=endpoint).text() == "auserbuser"
    (a,), (b,) = client.encode("a"), client.encode("b")
    assert sent == [(a,), (a, *letters, b)]


def test_only_the_servers_template_counts(
    client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter adds stop strings of its own chat template to every gen."""
    stops = []
    generate = client.generate

    def seen(ids: Any, sampling: Any, *rest: Any, **body: Any) -> Output:
        stops.append(sampling.get("stop"))
        return generate(ids, sampling, *rest, **body)

    monkeypatch.setattr(client, "generate", seen)
    endpoint = MementoEndpoint(client=client, chat_template_name="chatml")
    assert endpoint.chat_template.stop_str
    assert run(endpoint, SMALL.question, Options.greedy()).ret_value.answer == SMALL.answer
    assert len(stops) > 8
    assert not any(stops)


def test_a_thought_may_end_with_several_tokens(
    client: NativeClient, endpoint: MementoEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(endpoint, SMALL.question, Options.greedy()).ret_value
    monkeypatch.setattr(client, "markers", client.markers._replace(think_end=None))
    assert run(endpoint, SMALL.question, Options.greedy()).ret_value == expected


def test_streams(client: NativeClient, endpoint: MementoEndpoint) -> None:
    state = run(endpoint, SMALL.question, Options.greedy(), stream=True)
    text = "".join(state.text_iter())
    assert text.endswith(SMALL.output)
    events: list[Any] = []
    found = reason_in_one_call(client, SMALL.question, Options.greedy(), on_event=events.append)
    assert "".join(event.text for event in events) == SMALL.output
    assert [e.tokens for e in events if isinstance(e, BlockClosed)] == [
        block.tokens for block in found.blocks
    ]
    assert isinstance(events[-1], Done)


def test_many_questions_at_once(endpoint: MementoEndpoint) -> None:
    problems = held_out(6, sizes=(2, 3, 4))
    rows = [{"question": p.question, "options": Options.greedy()} for p in problems]
    states = reason.run_batch(rows, backend=endpoint, num_threads=6)
    assert [state.ret_value.answer for state in states] == [p.answer for p in problems]


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize("use_thread", [True, False])
def test_refusals_reach_the_caller(endpoint: MementoEndpoint, use_thread: bool) -> None:
    both = {"keep_last_n_blocks": 1, "keep_last_block_for_answer": True}
    options = Options.greedy(server=both)
    with pytest.raises(RefusedError, match="needs keep_last_n_blocks=0"):
        run(endpoint, SMALL.question, options, use_thread=use_thread)
    with pytest.raises(RefusedError, match="needs keep_last_n_blocks=0"):
        vote.run(SMALL.question, 2, options, backend=endpoint, use_thread=use_thread)
    with pytest.raises(RefusedError, match="the context ends at 4096"):
        run(endpoint, "7" * 5000, Options(), use_thread=use_thread)


def test_what_cannot_be_exact_is_refused(server: Served, endpoint: MementoEndpoint) -> None:
    def attempt(expression: Any) -> None:
        program = sgl.function(lambda s: s.stream_executor.submit(expression))
        program.run(backend=endpoint, use_thread=False)

    with pytest.raises(ConfigError, match="each choice must be one token"):
        attempt("a" + sgl.select("x", ["yes", "no"]))
    with pytest.raises(ConfigError, match=r"use fork\(2\)"):
        attempt("a" + sgl.gen("x", n=2))
    with pytest.raises(ConfigError, match="temperature 0"):
        attempt("a" + sgl.select("x", ["a", "b"], temperature=0.5))
    with pytest.raises(ConfigError, match="MementoEndpoint"):
        reason.run(SMALL.question, backend=sgl.RuntimeEndpoint(server.url))
    with pytest.raises(EndpointError, match="no answer from"):
        MementoEndpoint("http://127.0.0.1:9")
