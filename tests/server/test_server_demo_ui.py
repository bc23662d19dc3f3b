"""The page on SGLang's own server: `memento serve` with the embedded model and an API key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import websockets.sync.client as client
from browser import chromium, needs_browser
from conftest import Served

from memento_sgl.demo.task import held_out

pytestmark = pytest.mark.server
KEY = "sesame"
PROBLEM = held_out(1, sizes=[6])[0]


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("demo-key", "demo", "--api-key", KEY, "--chat-template", "memento_nosys")


def get(server: Served, what: str, key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}/memento{what}", headers=headers, timeout=60)


def ask(socket: Any, number: int, key: str | None = KEY, **options: Any) -> None:
    body = {"model": "demo", "messages": PROBLEM.messages, "temperature": 0, "stream": True}
    socket.send(json.dumps({"id": number, "ask": body | options, "key": key}))


def until_end(socket: Any) -> list[dict[str, Any]]:
    lines: list[str] = []
    while not lines or not lines[-1].endswith(" ."):
        lines += str(socket.recv(60)).split("\n")
    return [json.loads(line.split(" ", 1)[1]) for line in lines[:-1]]


def connect(server: Served) -> Any:
    return client.connect(f"{server.url.replace('http', 'ws')}/memento/socket")


def test_only_the_page_itself_needs_no_key(server: Served) -> None:
    assert get(server, "", None).headers["content-type"].startswith("text/html")
    assert "sha256-" in get(server, "", None).headers["content-security-policy"]
    for what in ("/about", "/stats"):
        assert get(server, what, None).status_code == 401
        assert get(server, what).status_code == 200
    for method in ("POST", "DELETE"):
        assert httpx.request(method, f"{server.url}/memento", timeout=60).status_code == 401
    with connect(server) as socket:
        ask(socket, 1, None)
        assert until_end(socket)[0]["refused"] == 401
        ask(socket, 2)
        assert "refused" not in until_end(socket)[0]


def test_about_tells_options_and_no_paths(server: Served) -> None:
    told = get(server, "/about").json()
    assert told["kind"] == "memento"
    assert told["options"]["mask_delimiters"] is False
    assert len(told["models"]) == 1
    assert "trace_dir" not in told["options"]


def test_the_load_is_live_and_stop_ends_the_request(server: Served) -> None:
    before = get(server, "/stats").json()
    assert (before["running"], before["waiting"], before["capacity"]) == (0, 0, 20000)
    endless = {"ignore_eos": True, "max_tokens": 3000}
    with connect(server) as socket:
        for number in range(3):
            ask(socket, number, **endless)
        seen = wait(server, lambda told: told["running"] == 3 and told["missing"] > 0)
        assert seen["held"] > 0
        assert seen["evictions"] > before["evictions"]
        for number in range(2):
            socket.send(json.dumps({"id": number, "stop": True}))
        wait(server, lambda told: told["running"] == 1)
    # The last one ends with its tab.
    seen = wait(server, lambda told: told["running"] == 0)
    assert (seen["held"], seen["missing"]) == (0, 0)


def wait(server: Served, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(600):
        told: dict[str, Any] = get(server, "/stats").json()
        if condition(told):
            return told
        time.sleep(0.05)
    raise AssertionError(told)


def test_evictions_are_counted(server: Served) -> None:
    before = get(server, "/stats").json()["evictions"]
    with connect(server) as socket:
        ask(socket, 1)
        until_end(socket)
    wait(server, lambda told: told["evictions"] == before + len(PROBLEM.groups))


@needs_browser
def test_a_chat_in_the_browser(server: Served) -> None:
    with chromium() as browser:
        tab = browser.new_page()
        tab.goto(f"{server.url}/memento")
        tab.locator("#secret").fill(KEY)
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".chat textarea")
        # The name of the only model; greedy.
        tab.evaluate(
            "() => { app.chats[0].options.querySelector('[name=temperature]').value = 0; }"
        )
        tab.locator(".chat textarea").fill(PROBLEM.question)
        tab.keyboard.press("Enter")
        tab.wait_for_function("() => app.chats[0].turns.length && !app.chats[0].running")
        blocks = len(PROBLEM.groups)
        assert tab.locator(".unit.gone").count() == blocks
        assert f"{blocks} of {blocks} blocks evicted" in tab.locator(".state").text_content()
        live, exact = tab.evaluate(
            """() => {
              const story = app.chats[0].turns[0].story, record = story.record;
              const exact = story.data();
              story.record = null;
              const live = story.data();
              story.record = record;
              return [live, exact];
            }"""
        )
        # Chunks of two tokens hide a marker's place: off by a few.
        for one, other in zip(live["evictions"], exact["evictions"], strict=True):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 3
