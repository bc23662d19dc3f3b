"""What programs decide without a server: options, votes, accounting of many calls, files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from memento_frontend.answers_file import AnswersFile, read_items
from memento_frontend.join_calls import whole_record
from memento_frontend.native import NativeClient
from memento_frontend.one_call import check_one_call
from memento_frontend.options import Options, Sampling
from memento_frontend.results import Reasoning
from memento_frontend.votes import majority

from memento_sgl.errors import (
    ConfigError,
    DataError,
    EndpointError,
    RefusedError,
    RequestError,
    StoreError,
)
from memento_sgl.rule.accounting import account
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4)
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_tokens": 0}, ConfigError, "max_tokens must be a whole number"),
        ({"regex": "(", }, ConfigError, "regex is not valid"),
        ({"regex": "a", "json_schema": "{}"}, ConfigError, "exclude each other"),
        ({"json_schema": "{"}, ConfigError, "json_schema is not valid JSON"),
        ({"server": {"keep": 1}}, RequestError, "unknown option 'keep'"),
        ({"server": {"max_blocks": 1}}, ConfigError, "max_blocks in `server`"),
        ({"constrain": "hard"}, RequestError, "constrain"),
    ],
)  # fmt: skip
def test_options_that_cannot_work(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options(**values)


def test_options_go_to_the_server_by_its_names() -> None:
    options = Options(
        max_blocks=4, max_block_tokens=9, max_summary_tokens=3, constrain="strict",
        server={"min_blocks": 2},
    )  # fmt: skip
    assert options.request() == {
        "min_blocks": 2, "max_blocks": 4, "max_block_tokens": 9, "max_summary_tokens": 3,
        "constrain": "strict",
    }  # fmt: skip
    assert Options(max_blocks=4).request() == {}
    assert Options(json_schema={"type": "object"}).answer_shape() == {
        "json_schema": '{"type": "object"}'
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(block=Sampling(temperature=0.5)), "one sampling"),
        (Options(max_answer_tokens=5), "a call of its own"),
        (Options(max_blocks=5), 'needs constrain="strict"'),
    ],
)
def test_what_one_call_cannot_do(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_one_call(NativeClient(), options)


def test_the_majority_counts_and_of_equals_the_first() -> None:
    def asked(*answers: str) -> Any:
        vote = majority([Reasoning((), answer) for answer in answers])
        assert len(vote.attempts) == len(answers)
        return vote.answer, vote.votes

    assert asked("b", "a", " a\n", "") == ("a", 2)
    assert asked("b", "a", "a", "b") == ("b", 2)
    assert asked("", "", "a") == ("a", 1)
    assert asked("", "") == ("", 0)


@pytest.mark.parametrize("keep", [0, 1])
def test_the_last_call_knows_all_but_the_sums(keep: int) -> None:
    rng = random.Random(3)
    config = CONFIG.model_copy(update={"keep_last_n_blocks": keep})
    for _ in range(50):
        tokens = rng.choices([1, 2, 3, 4, 9], weights=[2, 2, 2, 2, 9], k=rng.randint(2, 120))
        prompt, last = sorted(rng.sample(range(1, len(tokens) + 1), 2))
        machine = replay(tokens, prompt, MARKERS, config)
        of_call = account(machine, last, len(tokens)).as_dict()
        whole = account(machine, prompt, len(tokens)).as_dict()
        assert whole_record(of_call, prompt, len(tokens)) == whole


def answering(status: int, body: Any) -> NativeClient:
    client = NativeClient("http://somewhere")
    client._http = httpx.Client(
        base_url=client.base_url,
        transport=httpx.MockTransport(lambda _: httpx.Response(status, json=body)),
    )
    return client


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RefusedError), (500, RefusedError), (401, EndpointError), (503, EndpointError)],
)
def test_refusals_of_one_and_of_all(status: int, kind: type[Exception]) -> None:
    client = answering(status, {"error": {"message": "no such thing"}})
    with pytest.raises(EndpointError, match="no such thing") as caught:
        client.generate([1], {})
    assert caught.type is kind
    with pytest.raises(kind, match="no such thing"):
        next(client.stream([1], {}))


def test_questions_come_as_texts_rows_and_lines(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "c"}]
    rows = ["a", {"question": "b", "id": 7, "gold": 1}, {"messages": chat}]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_items(rows) == read_items(file)
    assert [item.id for item in read_items(file)] == ["1", "7", "3"]
    assert read_items(file)[1].row == {"question": "b", "id": 7, "gold": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], "question1: needs either `question`"),
        ([{"question": "a", "messages": [{}]}], "needs either"),
        ([4], "expected a text or an object, got int"),
        (["a", {"question": "b", "id": 1}], "question2: the id '1' is there twice"),
    ],
)
def test_rows_that_are_no_questions(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_items(rows)


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('"a"\n{"question": "b"')
    with pytest.raises(DataError, match=r"q\.jsonl:2 is not valid JSON"):
        read_items(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")


def answers(path: Path, **settings: Any) -> AnswersFile:
    return AnswersFile(path, {"model": "m", "options": {"max_tokens": 5} | settings})


def test_a_line_that_was_torn_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    items = read_items(["a", "b\ud800 \u2028", "c"])
    with answers(path) as file:
        assert file.keep(items, retry_failed=False) == set()
        file.add(items[0], error="why")
        file.add(items[1], vote=majority([Reasoning((), "x")]))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "3", "answer": "y')
    with answers(path) as file:
        assert path.read_bytes() == whole
        assert file.keep(items, retry_failed=False) == {"1", "2"}
        assert (file.answered, file.failed) == (1, 1)
    with answers(path) as file:
        assert file.keep(items, retry_failed=True) == {"2"}
        file.add(items[0], vote=majority([Reasoning((), "z")]))
    assert [json.loads(line)["answer"] for line in path.read_text().split("\n")[:-1]] == ["x", "z"]


def test_files_that_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(StoreError, match=message):
            answers(path, **settings)

    with answers(path) as file:
        file.add(read_items(["a"])[0], error="why")
        refused("is in use")
    refused(r"options\.max_tokens: 5 then, 6 now", max_tokens=6)
    refused(r"options\.regex: None then, 'a' now", regex="a")
    with answers(path) as file, pytest.raises(StoreError, match="another question '1'"):
        file.keep(read_items(["other"]), retry_failed=False)
    path.write_text('{"id": "1"}\n')
    refused("a.jsonl:1 is no result")
    path.write_text("")
    with answers(path, max_tokens=6) as file:  # nothing answered: nothing binds
        file.add(read_items(["a"])[0], error="why")
    (tmp_path / "a.jsonl.settings.json").unlink()
    refused("is missing", max_tokens=6)
