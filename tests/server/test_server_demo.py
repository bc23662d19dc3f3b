"""The embedded model behind `memento serve`: exactness, accounting, options, other endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from conftest import Served
from demo_chat import ask, client_of, record_of, serve_demo

from memento_sgl.demo.task import Problem, held_out
from memento_sgl.observe.recorder import read_records

pytestmark = pytest.mark.server

# Sizes 2 to 24 blocks.
PROBLEMS = held_out(12, sizes=range(2, 25, 2))


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve_demo(serve)


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return client_of(server)


def prompt_of(server: Served, problem: Problem) -> list[int]:
    text = server.tokenizer.apply_chat_template(
        problem.messages, add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = server.tokenizer.encode(text, add_special_tokens=False)
    return ids


@pytest.mark.parametrize("concurrency", [1, 8])
def test_tokens_equal_the_oracle(server: Served, concurrency: int) -> None:
    problems = PROBLEMS if concurrency > 1 else PROBLEMS[:3]
    jobs = [(prompt_of(server, problem), 1200, {}) for problem in problems]
    evictions = server.verify_many(jobs, concurrency, ignore_eos=False)
    assert evictions >= 0.9 * sum(len(problem.groups) for problem in problems)
    server.assert_all_slots_free()


def test_chat_solves_problems_and_tells_what_was_evicted(
    server: Served, client: openai.OpenAI
) -> None:
    right = 0
    for problem in PROBLEMS[::3]:
        answer = ask(client, problem)
        record = record_of(answer)
        right += answer.choices[0].message.content == problem.answer
        assert record["blocks"] == len(record["evicted_spans"]) == len(problem.groups)
        assert record["peak_kv_tokens"] < record["peak_kv_tokens_without"]
        assert record["peak_kv_tokens_without"] == answer.usage.total_tokens - 1
    assert right == 4


def test_a_stream_gives_the_same_text_and_record(client: openai.OpenAI) -> None:
    whole = ask(client, PROBLEMS[2])
    text, metadata = "", None
    for chunk in ask(client, PROBLEMS[2], stream=True):
        extra = (chunk.model_extra or {}).get("metadata")
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
            assert metadata is None
        metadata = extra or metadata
    assert text == whole.choices[0].message.content
    assert read_records(metadata) == [record_of(whole)]


async def test_the_async_client_streams_several_choices(server: Served) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    stream = await ask(client, PROBLEMS[1], stream=True, n=2)  # type: ignore[arg-type]
    records = [
        read_records(chunk.model_extra["metadata"])
        async for chunk in stream
        if (chunk.model_extra or {}).get("metadata")
    ]
    assert len(records) == 2
    assert records[0] == records[1]


def test_completions(server: Served, client: openai.OpenAI) -> None:
    prompt = server.tokenizer.decode(prompt_of(server, PROBLEMS[0]))
    options: dict[str, Any] = {
        "model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 400
    }  # fmt: skip
    whole = client.completions.create(**options)
    record = record_of(whole)
    assert len(record["evicted_spans"]) == len(PROBLEMS[0].groups)
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert record_of(chunks[-1]) == record


def test_a_request_may_turn_eviction_off_or_keep_blocks(client: openai.OpenAI) -> None:
    def with_options(**options: Any) -> Any:
        body = {"custom_params": {"memento": options}}
        return ask(client, PROBLEMS[1], extra_body=body)

    assert "memento" not in with_options(enable=False).model_extra["metadata"]
    kept = record_of(with_options(keep_last_n_blocks=-1))
    assert kept["blocks"]
    assert kept["evicted_spans"] == []
    one = record_of(with_options(keep_last_n_blocks=1))
    assert len(one["evicted_spans"]) == one["blocks"] - 1


def test_nonsense_is_a_400_and_the_server_goes_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown option 'keep'"):
        ask(client, PROBLEMS[0], extra_body={"custom_params": {"memento": {"keep": 1}}})
    with pytest.raises(openai.BadRequestError, match="unknown option 'keep'"):
        list(
            ask(client, PROBLEMS[0], extra_body={"custom_params": {"memento": {"keep": 1}}},
                stream=True)
        )  # fmt: skip
    assert ask(client, PROBLEMS[0]).choices[0].message.content


def test_a_dropped_system_message_is_logged(server: Served, client: openai.OpenAI) -> None:
    before = server.log.read_text().count("drops the system message")
    plain = ask(client, PROBLEMS[0])
    assert server.log.read_text().count("drops the system message") == before
    messages = [{"role": "system", "content": "Be brief."}, *PROBLEMS[0].messages]
    answer = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=2000  # type: ignore[arg-type]
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    assert server.log.read_text().count("drops the system message") == before + 1


def test_native_stream_ends_with_the_record(server: Served) -> None:
    body = {
        "text": server.tokenizer.decode(prompt_of(server, PROBLEMS[0])),
        "sampling_params": {"temperature": 0, "max_new_tokens": 400},
        "stream": True,
    }
    records = []
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                records.append(json.loads(line[6:])["meta_info"].get("memento"))
    assert records[-1] is not None
    assert records[:-1] == [None] * (len(records) - 1)


@pytest.mark.filterwarnings("error")
def test_clients_read_the_accounting_without_a_warning(server: Served) -> None:
    """The same record from every interface, whole and streamed, through the packages that people
    use; what a package does not know it must keep, not warn of."""
    import anthropic

    user: Any = PROBLEMS[1].messages
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    chat = client.chat.completions.create(model=model, messages=user, temperature=0, max_tokens=900)
    chat.model_dump_json()
    (record,) = read_records(chat.model_extra["metadata"])  # type: ignore[misc, index]
    assert record
    assert record["evicted_spans"]

    def same(other: Any) -> None:
        assert other["evicted_spans"] == record["evicted_spans"]
        assert other["blocks"] == record["blocks"]

    asked: Any = {"model": model, "input": user, "temperature": 0, "max_output_tokens": 900}
    response = client.responses.create(**asked)
    response.model_dump_json()
    same(read_records(response.metadata)[0])  # type: ignore[index]
    *_, last = client.responses.create(**asked, stream=True)
    last.model_dump_json()
    assert set(map(type, last.response.metadata.values())) == {str}
    same(read_records(last.response.metadata)[0])  # type: ignore[index]

    other = anthropic.Anthropic(base_url=server.url, api_key="none")
    greedy = {"temperature": 0}  # not every version of the package takes it
    asked = {"model": model, "messages": user, "max_tokens": 900, "extra_body": greedy}
    message = other.messages.create(**asked)
    message.model_dump_json()
    same(message.model_extra["memento"])  # type: ignore[index]
    found = []
    for event in other.messages.create(**asked, stream=True):
        event.model_dump_json()
        found += [event.model_extra["memento"]] if "memento" in (event.model_extra or {}) else []
    assert len(found) == 1
    same(found[0])

    options = {"temperature": 0, "num_predict": 900}
    for stream in (False, True):
        answer = server.post(
            "/api/chat", model=model, messages=user, stream=stream, options=options
        )
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert ["memento" in line for line in lines] == [line["done"] for line in lines]
        same(lines[-1]["memento"])
