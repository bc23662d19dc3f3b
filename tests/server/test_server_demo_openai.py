"""Thought and answer apart on `/v1/chat/completions`, asked through the real `openai` package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from conftest import Served
from demo_chat import ask, client_of, record_of, serve_demo

from memento_sgl.demo.task import Problem, held_out

pytestmark = pytest.mark.server

# Not those of test_server_demo: what the prefix cache holds is looked at here.
PROBLEMS = held_out(24, sizes=range(3, 11))[12:]
PAGE = Path(__file__).parents[2] / "docs" / "openai.md"
MARKER = re.compile(r"<\|(?:block|summary)_(?:start|end)\|>")
SHOWN = {"custom_params": {"memento": {"show_markers": True}}}
DIRECT = {"chat_template_kwargs": {"enable_thinking": False}}
TOTAL = r"\{\"total\": \d\d\}"
BLOCK = (
    r"(<\|block_start\|>[^<]{1,80}<\|block_end\|><\|summary_start\|>[a-z]=\d\d<\|summary_end\|>\n)"
)
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve_demo(serve)


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return client_of(server)


class Said(NamedTuple):
    """One choice, whole or put together from a stream."""

    thought: str
    content: str
    finish: str


def said(answer: Any) -> Said:
    (choice,) = answer.choices
    thought = choice.message.reasoning_content or ""
    return Said(thought, choice.message.content, choice.finish_reason)


def streamed(chunks: Any) -> Said:
    thought = content = finish = ""
    for chunk in chunks:
        for choice in chunk.choices:
            if more := choice.delta.model_extra.get("reasoning_content"):
                assert not content
                thought += more
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return Said(thought, content, finish)


def ask_both(client: openai.OpenAI, problem: Problem, **options: Any) -> Any:
    """The whole answer, which the stream has to equal."""
    answer = ask(client, problem, **options)
    assert streamed(ask(client, problem, stream=True, **options)) == said(answer)
    return answer


def written(thought: str, content: str) -> str:
    """What the model wrote, given its thought with markers."""
    return f"<think>\n{thought}\n</think>\n{content}"


def cached(answer: Any) -> int:
    count: int = answer.usage.prompt_tokens_details.cached_tokens
    return count


def test_clients_see_a_clean_answer(server: Served, client: openai.OpenAI) -> None:
    problem = PROBLEMS[0]
    answer = ask_both(client, problem)
    thought, content, finish = said(answer)
    assert (content, finish) == (problem.answer, "stop")
    assert thought == MARKER.sub("", problem.output).split("\n", 1)[1].rpartition("\n</think>")[0]
    until = problem.output.partition("</think>")[0] + "</think>"
    assert answer.usage.model_extra["reasoning_tokens"] == len(server.tokenizer.encode(until))
    assert len(record_of(answer)["evicted_spans"]) == len(problem.groups)


def test_markers_are_shown_when_asked_for(client: openai.OpenAI) -> None:
    problem = PROBLEMS[0]
    plain, shown = ask_both(client, problem), ask_both(client, problem, extra_body=SHOWN)
    thought, content, _ = said(shown)
    assert written(thought, content) == problem.output
    assert MARKER.sub("", thought) == said(plain).thought
    # Same tokens, same keys in the radix tree: all of the prompt but its last token was there.
    assert shown.usage.completion_tokens == plain.usage.completion_tokens
    assert cached(shown) == shown.usage.prompt_tokens - 1


def test_raw_text_stays_available(client: openai.OpenAI) -> None:
    answer = ask_both(client, PROBLEMS[0], extra_body={"separate_reasoning": False})
    assert said(answer) == ("", PROBLEMS[0].output, "stop")


async def test_the_async_client_streams_several_choices(server: Served) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    stream = await ask(client, PROBLEMS[1], stream=True, n=2)  # type: ignore[arg-type]
    contents, thoughts = ["", ""], ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            contents[choice.index] += choice.delta.content or ""
            thoughts[choice.index] += choice.delta.model_extra.get("reasoning_content") or ""
    assert contents == [PROBLEMS[1].answer] * 2
    assert thoughts[0] == thoughts[1] == said(ask(client_of(server), PROBLEMS[1])).thought


def test_a_thought_cut_short_is_all_thought(client: openai.OpenAI) -> None:
    whole = said(ask(client, PROBLEMS[2]))
    for limit in (1, 2, 3, 30):
        thought, content, finish = said(ask_both(client, PROBLEMS[2], max_tokens=limit))
        assert (content, finish) == ("", "length")
        assert whole.thought.startswith(thought)
    assert thought


def test_an_answer_without_a_thought_is_content(client: openai.OpenAI) -> None:
    shape = r"The total is \d\d\."
    answer = ask_both(client, PROBLEMS[2], extra_body={"regex": shape} | DIRECT)
    thought, content, _ = said(answer)
    assert thought == ""
    assert re.fullmatch(shape, content)
    # The server's default does not take a direct answer for a thought either.
    begun = [*PROBLEMS[2].messages, {"role": "assistant", "content": "The total"}]
    options = {"messages": begun, "extra_body": {"continue_final_message": True}}
    thought, content, _ = said(ask_both(client, PROBLEMS[2], max_tokens=12, **options))
    assert thought == ""
    assert content.strip()  # whatever the model makes of a beginning that it never learned


def test_a_constraint_binds_the_answer_only(client: openai.OpenAI) -> None:
    problem = PROBLEMS[3]
    answer = ask_both(client, problem, extra_body={"regex": TOTAL})
    thought, content, _ = said(answer)
    assert thought == said(ask(client, problem)).thought
    assert re.fullmatch(TOTAL, content)
    assert len(record_of(answer)["evicted_spans"]) == len(problem.groups)


def test_a_json_schema_binds_the_answer_only(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"total": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["total", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    answer = ask_both(client, PROBLEMS[3], response_format=form)
    found = json.loads(said(answer).content)
    assert isinstance(found["total"], int)
    assert isinstance(found["sure"], bool)
    assert len(record_of(answer)["evicted_spans"]) == len(PROBLEMS[3].groups)


def test_strict_emission_and_a_constraint_go_together(client: openai.OpenAI) -> None:
    strict = {"custom_params": {"memento": {"constrain": "strict", "max_blocks": 2}}}
    answer = ask(client, PROBLEMS[3], extra_body=strict | {"regex": TOTAL})
    thought, content, _ = said(answer)
    assert thought
    assert re.fullmatch(TOTAL, content)
    assert len(record_of(answer)["evicted_spans"]) == 2


def test_without_thinking_a_constraint_binds_everything(client: openai.OpenAI) -> None:
    shape = f"<think>\\n{BLOCK}+</think>\\n{TOTAL}"
    answer = ask(client, PROBLEMS[3], extra_body={"regex": shape} | DIRECT | SHOWN)
    thought, content, _ = said(answer)
    assert re.fullmatch(shape, written(thought, content))
    assert len(record_of(answer)["evicted_spans"]) >= 3


def test_a_tool_is_called_after_the_thought(client: openai.OpenAI) -> None:
    # The model has never seen tools: all that it writes is bound to a thought and a call. A number
    # of JSON does not begin with 0.
    call = r'<tool_call>\n\{"name": "add", "arguments": \{"a": [1-9]\d\}\}\n</tool_call>'
    form = f"<think>\\n{BLOCK}{{2}}</think>\\n{call}"
    options = {"tools": [ADD], "extra_body": {"regex": form} | DIRECT}
    answer = ask(client, PROBLEMS[4], **options)
    (choice,) = answer.choices
    (called,) = choice.message.tool_calls
    assert (choice.finish_reason, called.function.name) == ("tool_calls", "add")
    assert isinstance(json.loads(called.function.arguments)["a"], int)
    assert not choice.message.content
    assert choice.message.reasoning_content
    assert len(record_of(answer)["evicted_spans"]) == 2
    arguments = thought = content = ""
    for chunk in ask(client, PROBLEMS[4], stream=True, **options):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thought += choice.delta.model_extra.get("reasoning_content") or ""
            for part in choice.delta.tool_calls or ():
                arguments += part.function.arguments or ""
    assert (arguments, content.strip()) == (called.function.arguments, "")
    assert thought == answer.choices[0].message.reasoning_content


def test_a_history_with_markers_finds_all_its_kv(client: openai.OpenAI) -> None:
    problem = PROBLEMS[5]
    first = ask(client, problem, extra_body=SHOWN)
    thought, content, _ = said(first)
    question = {"role": "user", "content": PROBLEMS[6].question}

    def follow_up(**message: str) -> Any:
        history = [*problem.messages, {"role": "assistant", "content": content} | message, question]
        return ask(client, problem, messages=history, max_tokens=1)

    # The end-of-turn token may have been read by the step after it, or not.
    assert cached(follow_up(reasoning_content=thought)) >= first.usage.total_tokens - 1
    # Without markers both begin with "<think>" and a newline, without a thought neither.
    bare = MARKER.sub("", thought)
    assert cached(follow_up(reasoning_content=bare)) == first.usage.prompt_tokens + 2
    assert cached(follow_up()) == first.usage.prompt_tokens


def test_the_separate_endpoint_knows_the_parser(server: Served) -> None:
    body = {"text": PROBLEMS[0].output, "reasoning_parser": "memento"}
    found = httpx.post(f"{server.url}/separate_reasoning", json=body, timeout=30).json()
    assert found["text"] == PROBLEMS[0].answer
    assert not MARKER.search(found["reasoning_text"])


def test_the_pages_example_runs(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(example.replace("http://127.0.0.1:30000", server.url), {})
    assert capsys.readouterr().out.splitlines()[-1] == "The total is 22."


def test_constraints_survive_retraction(serve: Callable[..., Served]) -> None:
    server = serve("demo-retract", "demo", environment={"SGLANG_TEST_RETRACT": "1"})
    client = client_of(server)
    body = SHOWN | {"regex": TOTAL, "return_meta_info": True}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda p: ask(client, p, extra_body=body), PROBLEMS[:8]))
    retracted = 0
    for problem, answer in zip(PROBLEMS[:8], answers, strict=True):
        thought, content, _ = said(answer)
        retracted += answer.choices[0].meta_info["num_retractions"]
        until = problem.output.partition("</think>")[0] + "</think>"
        assert written(thought, "") == f"{until}\n"
        assert re.fullmatch(TOTAL, content)
        assert answer.usage.model_extra["reasoning_tokens"] == len(server.tokenizer.encode(until))
        assert len(record_of(answer)["evicted_spans"]) == len(problem.groups)
    assert retracted > 0
    server.assert_all_slots_free()
