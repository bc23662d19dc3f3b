"""A request to an ASGI application from within it, streamed: no port, no socket, all middleware."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import HTTPConnection

from memento_sgl.ui.relay import Answer

Message = dict[str, Any]


@asynccontextmanager
async def post_inside(
    app: Any, path: str, connection: HTTPConnection, body: bytes, key: str | None
) -> AsyncIterator[Answer]:
    """POST a JSON body to `path` of the application that `connection` came to.

    Leaving the block is what a client does that hangs up.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not left.is_set():
            messages.put_nowait(message)

    task = asyncio.create_task(app(_scope(connection, path, body, key), receive, send))
    task.add_done_callback(lambda _task: messages.put_nowait(None))
    try:
        start = await messages.get()
        if start is None:
            raise ConnectionError(f"the server gave no answer: {task.exception()}")
        yield Answer(start["status"], _body(messages))
    finally:
        left.set()
        # The application notices by itself; what it does then (abort the request) is its own.
        await asyncio.wait({task})


async def _body(messages: asyncio.Queue[Message | None]) -> AsyncIterator[bytes]:
    while (message := await messages.get()) is not None:
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
    raise ConnectionError("the server broke the answer off")


def _scope(connection: HTTPConnection, path: str, body: bytes, key: str | None) -> Message:
    outer = connection.scope
    root = outer.get("root_path", "")
    headers = [
        (b"host", connection.headers.get("host", "").encode("latin-1")),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # 2.4: disconnects as errors of `send`
        "http_version": "1.1",
        "method": "POST",
        "scheme": {"wss": "https"}.get(outer["scheme"], "http"),
        "path": root + path,
        "raw_path": (root + path).encode(),
        "query_string": b"",
        "root_path": root,
        "headers": headers,
        "client": outer.get("client"),
        "server": outer.get("server"),
        "state": dict(outer.get("state", {})),
    }
