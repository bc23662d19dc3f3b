"""`memento ui`: the page at /memento for any OpenAI-compatible server, through this machine.

    browser  ->  127.0.0.1:PORT (this process, adds the API key)  ->  the server

Whoever reaches the port uses the key. So it listens on the loopback interface only, and answers no
request that a page of another origin made or that was sent to another name (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route

from memento_frontend.client import told_options
from memento_sgl.address import api_root, server_root
from memento_sgl.errors import ConfigError
from memento_sgl.ui.about import LOADS, Kind, describe, load
from memento_sgl.ui.relay import Answer
from memento_sgl.ui.routes import PATH, routes

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
OWN_SITES = (None, "same-origin", "none")
"""Values of `Sec-Fetch-Site` for this page, an address typed in, and what is no browser."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Upstream:
    """The server behind the page.

    Args:
        base_url: its address, with or without /v1.
        key: API key; None: none is sent.
        model: the only one to offer; None: those that the server lists.
        transport: of httpx, for tests.

    Raises:
        ConfigError: `base_url` is no address.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        model: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.root = server_root(base_url)
        self._api = api_root(base_url)
        self._model = model
        self._tells_stats: str | None = f"{self.root}{PATH}/stats"
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(10, read=None)  # a long prefill says nothing for minutes
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, transport=transport
        )

    async def about(self, _request: Any) -> dict[str, Any]:
        """See `memento_sgl.ui.about.describe`.

        Raises:
            OSError: nobody answers there, or it does not accept the key.
        """
        told = await self._get(f"{self.root}{PATH}/about")
        if told is None:
            info = await self._get(f"{self.root}/server_info")
            options = told_options(info)
            kind: Kind = "openai" if info is None else "sglang" if options is None else "memento"
            told = describe(await self._models(), kind, options)
        return told if self._model is None else told | {"models": [self._model]}

    async def stats(self, _request: Any) -> dict[str, Any]:
        """See `memento_sgl.ui.about.load`; the first address that answers is asked from then on."""
        own, stock = f"{self.root}{PATH}/stats", f"{self.root}/v1/loads?include=core"
        if self._tells_stats == own:
            if (told := await self._get(own)) is not None:
                return told
            self._tells_stats = stock
        if self._tells_stats == stock:
            told = await self._get(stock)
            ranks = told.get("loads") if isinstance(told, dict) else None
            if isinstance(ranks, list) and all(
                field in r for r in ranks for field in LOADS.values()
            ):
                return load(ranks)
            self._tells_stats = None
        return load([])

    @asynccontextmanager
    async def post(
        self, _connection: HTTPConnection, body: bytes, _key: str | None
    ) -> AsyncIterator[Answer]:
        """A chat completion; see `memento_sgl.ui.relay.Post`."""
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.stream(
                "POST", f"{self._api}/chat/completions", content=body, headers=headers
            ) as response:
                yield Answer(response.status_code, self._body(response))
        except httpx.HTTPError as error:
            raise self._gone(error) from None

    async def _body(self, response: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.root} broke the answer off ({error})") from None

    async def _models(self) -> list[str]:
        told = await self._get(f"{self._api}/models")
        listed = told.get("data", []) if isinstance(told, dict) else []
        return [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one]

    async def _get(self, address: str) -> dict[str, Any] | None:
        """A JSON object; None where the server has no such page.

        Raises:
            OSError: nobody answers, or the key is not accepted.
        """
        try:
            response = await self._http.get(address, timeout=10)
        except httpx.HTTPError as error:
            raise self._gone(error) from None
        if response.status_code in (401, 403):
            raise PermissionError(
                f"{self.root} does not accept the API key: start `memento ui` with --api-key-env "
                "and the name of the variable that holds it"
            )
        try:
            told = response.json() if response.status_code == 200 else None
        except ValueError:
            return None
        return told if isinstance(told, dict) else None

    def _gone(self, error: httpx.HTTPError) -> ConnectionError:
        return ConnectionError(f"no answer from {self.root} ({error or type(error).__name__})")


class OwnPagesOnly:
    """Lets through what this page and programs on this machine ask for, and nothing else."""

    def __init__(self, app: Any, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in NAMES}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and not self.allows(Headers(scope=scope)):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await PlainTextResponse("for this machine's own page only\n", 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def allows(self, headers: Mapping[str, str]) -> bool:
        origin = headers.get("origin")
        return (
            headers.get("host") in self._hosts
            and (origin is None or origin in self._origins)
            and headers.get("sec-fetch-site") in OWN_SITES
        )


def application(upstream: Upstream, port: int) -> Any:
    """The ASGI application that `memento ui` serves on `port`."""

    async def to_page(_request: Any) -> RedirectResponse:
        return RedirectResponse(PATH)

    found = routes(about=upstream.about, stats=upstream.stats, post=upstream.post)
    return OwnPagesOnly(Starlette(routes=[Route("/", to_page), *found]), port)


def serve(upstream: Upstream, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until interrupted; `ready` gets its address once the port is open.

    Raises:
        ConfigError: the port is taken.
    """
    import socket

    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        raise ConfigError(f"port {port}: {error.strerror}; choose another with --port") from None
    listener.listen()
    port = listener.getsockname()[1]
    config = uvicorn.Config(application(upstream, port), log_level="warning", ws_max_size=1 << 24)
    ready(f"http://{LOOPBACK}:{port}{PATH}")
    uvicorn.Server(config).run(sockets=[listener])
