"""`memento ui` without a browser: the way of a chat, what is let through, what is asked."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
import websockets.asyncio.client as client
from canned_server import KEY, Canned, canned_application, canned_server, serving
from memento_frontend.ui import OwnPagesOnly, Upstream, application
from plain_server import KEY as PLAIN_KEY
from plain_server import plain_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed, InvalidStatus

from memento_sgl.errors import ConfigError
from memento_sgl.ui.about import describe, load
from memento_sgl.ui.inside import post_inside
from memento_sgl.ui.page import page
from memento_sgl.ui.relay import events
from memento_sgl.ui.routes import routes


@pytest.fixture
def canned() -> Iterator[Canned]:
    with canned_server(KEY) as found:
        yield found


@pytest.fixture
def url(canned: Canned) -> Iterator[str]:
    with serving(lambda port: application(Upstream(canned.url, KEY), port)) as found:
        yield found


async def chat(url: str, question: str, *, key: str | None = None, stop: bool = False) -> list[str]:
    """The payloads that the page would get."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True}
    found = []
    async with client.connect(f"{url.replace('http', 'ws')}/memento/socket") as socket:
        await socket.send(json.dumps({"id": 7, "ask": body, "key": key}))
        async for message in socket:
            for line in str(message).split("\n"):
                number, payload = line.split(" ", 1)
                assert number == "7"
                found.append(payload)
            if found[-1] == ".":
                return found
            if stop:
                await socket.send(json.dumps({"id": 7, "stop": True}))
    raise AssertionError("closed before the end")


def texts(payloads: list[str]) -> str:
    chunks = [json.loads(payload) for payload in payloads[:-1]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def test_a_chat_comes_as_the_server_sent_it(canned: Canned, url: str) -> None:
    found = await chat(url, "3 blocks")
    assert texts(found) == canned.trace("3 blocks").output
    last = json.loads(found[-2])
    assert json.loads(last["metadata"]["memento"])[0]["blocks"] == 3


async def test_many_chats_share_one_socket(canned: Canned, url: str) -> None:
    questions = [f"{number % 5 + 1} blocks" for number in range(40)]
    got: dict[int, str] = {}
    canned.gap = 0.001
    async with client.connect(f"{url.replace('http', 'ws')}/memento/socket") as socket:
        for number, question in enumerate(questions):
            ask = {"messages": [{"role": "user", "content": question}]}
            await socket.send(json.dumps({"id": number, "ask": ask}))
        ended = 0
        while ended < len(questions):
            for line in str(await socket.recv()).split("\n"):
                number, payload = line.split(" ", 1)
                if payload == ".":
                    ended += 1
                else:
                    delta = json.loads(payload)["choices"][0]["delta"]
                    got[int(number)] = got.get(int(number), "") + delta.get("content", "")
    assert got == {n: canned.trace(question).output for n, question in enumerate(questions)}


@pytest.mark.parametrize("how", ["stop", "leave"])
async def test_stop_and_a_closed_tab_reach_the_server(canned: Canned, url: str, how: str) -> None:
    if how == "stop":
        assert (await chat(url, "hang", stop=True))[-1] == "."
    else:
        async with client.connect(f"{url.replace('http', 'ws')}/memento/socket") as socket:
            ask = {"messages": [{"role": "user", "content": "hang"}]}
            await socket.send(json.dumps({"id": 1, "ask": ask}))
            await socket.recv()
    await asyncio.to_thread(wait_for, lambda: canned.left == ["hang"])


def wait_for(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("never came")


async def test_refusals_and_silence_are_told(canned: Canned) -> None:
    upstream = Upstream(canned.url, "wrong")
    with serving(lambda port: application(upstream, port)) as url:
        assert await chat(url, "3 blocks") == ['{"refused": 401, "reason": "Unauthorized"}', "."]
        response = httpx.get(f"{url}/memento/about")
        assert response.status_code == 502
        assert "--api-key-env" in response.json()["error"]
    with serving(lambda port: application(Upstream("http://127.0.0.1:9", None), port)) as url:
        (first, _) = await chat(url, "3 blocks")
        assert "no answer from http://127.0.0.1:9" in json.loads(first)["broken"]
        assert httpx.get(f"{url}/memento/stats").status_code == 502


async def test_nonsense_closes_the_socket(url: str) -> None:
    for text in ("{", "[]", '{"id": "x"}', '{"id": 1, "ask": 3}'):
        async with client.connect(f"{url.replace('http', 'ws')}/memento/socket") as socket:
            await socket.send(text)
            with pytest.raises(ConnectionClosed):
                await socket.recv()


def test_other_sites_and_other_names_are_refused(url: str) -> None:
    port = url.rsplit(":")[-1]
    allowed: list[dict[str, str]] = [
        {},
        {"Origin": url},
        {"Host": f"localhost:{port}", "Sec-Fetch-Site": "same-origin"},
    ]
    refused = [
        {"Host": f"evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]
    for path in ("/memento", "/memento/about", "/memento/stats", "/"):
        for headers in allowed:
            assert httpx.get(f"{url}{path}", headers=headers).status_code in (200, 307)
        for headers in refused:
            response = httpx.get(f"{url}{path}", headers=headers)
            assert response.status_code == 403, headers
    response = httpx.get(f"{url}/memento/about", headers={"Origin": url})
    assert not any(name.startswith("access-control") for name in response.headers)
    preflight = httpx.options(f"{url}/memento/about", headers={"Origin": "http://evil.example"})
    assert preflight.status_code == 403


async def test_a_socket_of_another_site_is_refused(url: str) -> None:
    address = f"{url.replace('http', 'ws')}/memento/socket"
    with pytest.raises(InvalidStatus):
        async with client.connect(address, origin="http://evil.example"):  # type: ignore[arg-type]
            pass
    async with client.connect(address, origin=url):  # type: ignore[arg-type]
        pass


@contextmanager
def own_server(key: str | None) -> Iterator[tuple[str, Canned]]:
    """The page on the server's own application, as in SGLang."""
    canned = Canned(key=key)
    app = canned_application(canned)
    post = partial(post_inside, app, "/v1/chat/completions")
    (page_route, *_, socket_route) = routes(about=nothing, stats=nothing, post=post)
    app.router.routes += [page_route, socket_route]
    with serving(lambda _port: app) as url:
        yield url, canned


async def nothing(_request: Request) -> dict[str, Any]:
    raise AssertionError


async def test_sglangs_own_server_refuses_sockets_of_other_sites_too() -> None:
    with own_server(None) as (url, _):
        address = f"{url.replace('http', 'ws')}/memento/socket"
        with pytest.raises(InvalidStatus):
            async with client.connect(address, origin="http://evil.example"):  # type: ignore[arg-type]
                pass
        async with client.connect(address, origin=url):  # type: ignore[arg-type]
            pass


def test_only_the_loopback_interface_is_served() -> None:
    guard = OwnPagesOnly(None, 80)
    assert guard.allows({"host": "127.0.0.1:80"})
    assert not guard.allows({"host": "0.0.0.0:80"})
    assert not guard.allows({"host": "192.168.0.2:80"})


async def test_the_key_stays_in_the_process(canned: Canned, url: str) -> None:
    for path in ("", "/about", "/stats"):
        response = httpx.get(f"{url}/memento{path}")
        assert response.status_code == 200
        assert KEY not in response.text + str(response.headers)
    assert texts(await chat(url, "1 blocks", key="not this one")) == canned.trace("1 blocks").output


async def test_servers_of_every_kind_are_described(canned: Canned) -> None:
    upstream = Upstream(f"{canned.url}/v1/", KEY)
    told = await upstream.about(None)
    assert (told["kind"], told["models"]) == ("memento", ["canned"])
    assert told["options"]["keep_last_n_blocks"] == 0
    assert "trace_dir" not in told["options"]
    canned.running = 2
    found = await upstream.stats(None)
    assert found == {
        "running": 2,
        "waiting": 0,
        "held": 200,
        "capacity": 5000,
        "evictions": 0,
        "missing": 80,
    }
    with plain_server() as address:
        plain = Upstream(address, PLAIN_KEY)
        assert await plain.about(None) == describe(["a", "b"], "openai", None)
        assert await plain.stats(None) == load([])
        one = Upstream(address, PLAIN_KEY, "b")
        assert (await one.about(None))["models"] == ["b"]


async def test_stock_sglang_and_older_memento_servers() -> None:
    asked = []
    rank = {
        "num_running_reqs": 3,
        "num_waiting_reqs": 1,
        "num_used_tokens": 70,
        "max_total_num_tokens": 100,
    }
    info: dict[str, Any] = {"internal_states": [{}]}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        told = {
            "/server_info": info,
            "/v1/models": {"data": [{"id": "m"}]},
            "/v1/loads": {"loads": [rank, rank]},
        }.get(request.url.path)
        return httpx.Response(404) if told is None else httpx.Response(200, json=told)

    upstream = Upstream("http://host:1", None, transport=httpx.MockTransport(answer))
    assert await upstream.about(None) == describe(["m"], "sglang", None)
    found = await upstream.stats(None)
    assert (found["running"], found["held"], found["evictions"]) == (6, 140, None)
    await upstream.stats(None)
    assert asked.count("/memento/stats") == 1
    info["internal_states"] = [{"_memento": [{"enable": True, "keep_last_n_blocks": 2}]}]
    told = await upstream.about(None)
    assert (told["kind"], told["options"]["keep_last_n_blocks"]) == ("memento", 2)


def test_what_is_no_address_is_said() -> None:
    for address in ("host:1", "ftp://host", "http://", ""):
        with pytest.raises(ConfigError, match="expected http"):
            Upstream(address, None)


async def test_events_are_found_however_the_body_is_cut() -> None:
    body = 'data: {"a":"ü"}\r\n\r\n: note\n\ndata:{"b":2}\n\ndata: [DONE]\n\n'.encode()

    async def cut(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    for size in (1, 2, 7, 1000):
        assert [event async for event in events(cut(size))] == ['{"a":"ü"}', '{"b":2}']


async def test_a_request_from_within_is_one_like_any_other() -> None:
    seen: dict[str, Any] = {}
    left = asyncio.Event()

    async def endpoint(request: Request) -> StreamingResponse:
        seen.update(headers=dict(request.headers), body=await request.json(), path=request.url.path)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                yield b"data: 1\n\n"
                await asyncio.sleep(3600)
            finally:
                left.set()

        return StreamingResponse(pieces())

    app = Starlette(routes=[Route("/v1/chat/completions", endpoint, methods=["POST"])])
    scope = {"type": "websocket", "scheme": "ws", "root_path": "", "headers": [(b"host", b"h:1")]}
    connection = Request(scope | {"type": "http"})
    async with post_inside(app, "/v1/chat/completions", connection, b'{"x":1}', "k") as answer:
        assert answer.status == 200
        async for piece in answer.body:
            assert piece == b"data: 1\n\n"
            break
    await asyncio.wait_for(left.wait(), 5)
    assert seen["body"] == {"x": 1}
    assert seen["headers"]["authorization"] == "Bearer k"
    assert seen["headers"]["host"] == "h:1"
    async with post_inside(app, "/nowhere", connection, b"{}", None) as answer:
        assert answer.status == 404


def test_the_page_is_complete_in_itself() -> None:
    html, headers = page()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert len(html) < 150_000
