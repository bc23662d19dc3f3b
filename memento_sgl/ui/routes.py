"""The addresses of the page: itself, what it asks the server about, and its WebSocket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from memento_sgl.ui.page import page
from memento_sgl.ui.relay import Post, Relay

PATH = "/memento"

Ask = Callable[[Request], Awaitable[dict[str, Any]]]
"""Gives a JSON object, or raises OSError with what a user should read."""


def routes(*, about: Ask, stats: Ask, post: Post) -> list[BaseRoute]:
    """The routes of a Starlette or FastAPI application that has the page.

    Args:
        about: what the server is: see `about.describe`.
        stats: what it does right now: see `about.load`.
        post: how a chat reaches it.
    """
    relay = Relay(post)

    async def socket(websocket: WebSocket) -> None:
        await relay(websocket)

    return [
        Route(PATH, _page, methods=["GET"]),
        Route(f"{PATH}/about", _json(about), methods=["GET"]),
        Route(f"{PATH}/stats", _json(stats), methods=["GET"]),
        WebSocketRoute(f"{PATH}/socket", socket),
    ]


async def _page(_request: Request) -> Response:
    found = page()
    return HTMLResponse(found.html, headers=found.headers)


def _json(ask: Ask) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await ask(request), headers={"Cache-Control": "no-store"})
        except OSError as error:
            return JSONResponse({"error": str(error)}, 502)

    return endpoint
