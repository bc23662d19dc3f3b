"""Many streamed chats over one WebSocket.

A browser opens six HTTP connections to one address, over all its tabs: the seventh chat would wait
for one of them to end. Of WebSockets it opens hundreds, and a tab needs one.

The page sends `{"id": N, "ask": BODY, "key": KEY}` to start a chat completion and
`{"id": N, "stop": true}` to end it. What comes back are texts `N PAYLOAD`: the JSON of every
streamed event as it was, `{"refused": STATUS, "reason": TEXT}` or `{"broken": REASON}` where it
went wrong, and `.` at the end. A message holds several of them, one per line, where they come fast:
a frame per token would cost the server and the browser more than the token's text.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketDisconnect

logger = logging.getLogger(__name__)

POLICY_VIOLATION, BAD_DATA = 1008, 1007
LONGEST_REASON = 2000
PAUSE = 0.03  # seconds between two messages to one page


class Answer(NamedTuple):
    """What a server answered: its body comes in pieces of any size."""

    status: int
    body: AsyncIterable[bytes]


Post = Callable[[HTTPConnection, bytes, str | None], AbstractAsyncContextManager[Answer]]
"""Sends the JSON body of a chat completion, with the key that the page was given, if any.

Raises:
    OSError: nobody answers, or the answer breaks off; the text is for the user.
"""


class Relay:
    """The WebSocket's endpoint."""

    def __init__(self, post: Post) -> None:
        self._post = post

    async def __call__(self, socket: WebSocket) -> None:
        if not same_origin(socket):
            await socket.close(POLICY_VIOLATION)
            return
        await socket.accept()
        chats: dict[int, asyncio.Task[None]] = {}
        outbox = _Outbox(socket)
        sending = asyncio.create_task(outbox.send())
        try:
            async for text in socket.iter_text():
                number, body, key = _read(text)
                if body is None:
                    if (running := chats.get(number)) is not None:
                        running.cancel()
                    continue
                chats[number] = task = asyncio.create_task(
                    self._chat(socket, outbox, number, body, key)
                )
                task.add_done_callback(partial(_forget, chats, number))
        except ValueError as error:
            await socket.close(BAD_DATA, f"{error}"[:100])
        finally:
            running_now = [*chats.values(), sending]
            for task in running_now:
                task.cancel()
            await asyncio.gather(*running_now, return_exceptions=True)

    async def _chat(
        self, socket: WebSocket, outbox: _Outbox, number: int, body: bytes, key: str | None
    ) -> None:
        try:
            async with self._post(socket, body, key) as answer:
                if answer.status == 200:
                    async for event in events(answer.body):
                        outbox.put(f"{number} {event}")
                else:
                    told = {"refused": answer.status, "reason": await _reason(answer.body)}
                    outbox.put(f"{number} {json.dumps(told)}")
        except OSError as error:
            outbox.put(f"{number} {json.dumps({'broken': str(error)})}")
        finally:  # stopped by the page too: it hears that this was the end
            outbox.put(f"{number} .")


class _Outbox:
    """Lines on their way to one page, as many in a message as came since the last one."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._lines: list[str] = []
        self._some = asyncio.Event()

    def put(self, line: str) -> None:
        self._lines.append(line)
        self._some.set()

    async def send(self) -> None:
        """Send for as long as the page is there."""
        try:
            while await self._some.wait():
                self._some.clear()
                lines, self._lines = self._lines, []
                await self._socket.send_text("\n".join(lines))
                await asyncio.sleep(PAUSE)
        except (RuntimeError, WebSocketDisconnect):
            logger.debug("the page has gone")


def _forget(chats: dict[int, asyncio.Task[None]], number: int, task: asyncio.Task[None]) -> None:
    if chats.get(number) is task:
        del chats[number]


def same_origin(connection: HTTPConnection) -> bool:
    """Whether a request comes from a page of the address it is sent to, or from no page at all.

    WebSockets are not subject to CORS: without this any page on the web could use them.
    """
    origin = connection.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == connection.headers.get("host")


async def events(body: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """The `data:` lines of a stream of server-sent events, without its `[DONE]`."""
    rest = b""
    async for piece in body:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield data.decode(errors="replace")


def _read(text: str) -> tuple[int, bytes | None, str | None]:
    """A message of the page: its chat, the body of a new one or None to stop it, the key.

    Raises:
        ValueError: it is none.
    """
    try:
        message = json.loads(text)
        number, body, key = message["id"], message.get("ask"), message.get("key")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise ValueError("not a message of this page") from None
    if not isinstance(number, int) or not (body is None or isinstance(body, dict)):
        raise ValueError("not a message of this page")
    return number, None if body is None else json.dumps(body).encode(), key or None


async def _reason(body: AsyncIterable[bytes]) -> str:
    """Why a server refused, in its words."""
    text = b"".join([piece async for piece in body]).decode(errors="replace")
    try:
        told = json.loads(text)
        told = told.get("error", told)
        told = told if isinstance(told, str) else told.get("message", told)
    except (json.JSONDecodeError, AttributeError):
        told = text
    return str(told)[:LONGEST_REASON]
