"""A Memento server without a model: streams what the rule makes of a text, token by token.

The question decides: `N blocks` solves a problem of that many blocks, `evil` writes hostile text,
`hang` writes a block and waits for the client to go, `separate ...` sends reasoning and content
apart, `old ...` gives the accounting as 0.1.0 did.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import held_out
from memento_sgl.observe.recorder import write_records
from memento_sgl.offline.inputs.formats import Trace
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.offline.simulate.replay import Replayer, Tokens, simulate
from memento_sgl.rule.config import MementoConfig
from memento_sgl.ui.about import describe, load

EVIL = '</script><script>window.owned=1</script><img src=x onerror="window.owned=2"><b>$&'
KEY = "sesame"
LONGEST = 24  # blocks of one problem of the demo


@dataclass
class Canned:
    """The server and what it saw.

    Attributes:
        gap: seconds between two tokens.
        bodies: of all chats, in order.
        left: questions whose clients went away.
        stats: answers that it was asked for.
        most: requests that ran at once.
    """

    url: str = ""
    gap: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    stats: int = 0
    running: int = 0
    most: int = 0
    evictions: int = 0
    key: str | None = None
    replayer: Replayer = field(
        default_factory=lambda: Replayer(
            TextTokenizer(MODEL_DIR), MementoConfig(enable=True, mask_delimiters=False)
        )
    )

    def trace(self, question: str) -> Trace:
        """The prompt and answer to a question."""
        return Trace(
            "",
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            _output(question),
        )

    def tokens(self, question: str) -> Tokens:
        return self.replayer.tokens(self.trace(question), pieces=True)


def _output(question: str) -> str:
    if question == "evil":
        block = f"<|block_start|>{EVIL}<|block_end|>\n<|summary_start|>{EVIL}<|summary_end|>\n"
        return f"<think>\n{block}</think>\n{EVIL}"
    if question == "hang":
        return "<think>\n<|block_start|>one"
    blocks = int(question.split()[-2])
    parts = [min(LONGEST, blocks - start) for start in range(0, blocks, LONGEST)]
    outputs = [
        held_out(number + 1, sizes=[size])[number].output for number, size in enumerate(parts)
    ]
    thoughts = [one.split("</think>")[0].removeprefix("<think>\n") for one in outputs]
    return f"<think>\n{''.join(thoughts)}</think>{outputs[-1].split('</think>')[1]}"


@contextmanager
def serving(build: Callable[[int], Any]) -> Iterator[str]:
    """Runs the ASGI application that `build` makes for a free port, in a thread; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(build(port), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        listener.close()


@contextmanager
def canned_server(key: str | None = None) -> Iterator[Canned]:
    canned = Canned(key=key)
    with serving(lambda _port: canned_application(canned)) as url:
        canned.url = url
        yield canned


def canned_application(canned: Canned) -> Any:
    async def about(_request: Request) -> Response:
        return JSONResponse(describe(["canned"], "memento", canned.replayer.config))

    async def stats(_request: Request) -> Response:
        canned.stats += 1
        rank = {
            "num_running_reqs": canned.running,
            "num_waiting_reqs": 0,
            "num_used_tokens": 100 * canned.running,
            "max_total_num_tokens": 5000,
            "memento": (canned.evictions, 40 * canned.running),
        }
        return JSONResponse(load([rank]))

    async def chat(request: Request) -> Response:
        body = await request.json()
        canned.bodies.append(body)
        question = body["messages"][-1]["content"]
        asked = body.get("custom_params", {}).get("memento", {})
        events = _stream(canned, question, asked.get("keep_last_n_blocks", 0))
        return StreamingResponse(events, media_type="text/event-stream")

    def guarded(endpoint: Any) -> Any:
        async def checked(request: Request) -> Response:
            if canned.key and request.headers.get("authorization") != f"Bearer {canned.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            found: Response = await endpoint(request)
            return found

        return checked

    return Starlette(
        routes=[
            Route("/memento/about", guarded(about)),
            Route("/memento/stats", guarded(stats)),
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        ]
    )


async def _stream(canned: Canned, question: str, keep_last: int) -> AsyncIterator[str]:
    tokens = canned.tokens(question)
    record = simulate(canned.replayer, tokens, keep_last).accounting.as_dict()
    pieces = tokens.pieces[tokens.prompt_len :]
    told = {"memento": [record] if question.startswith("old") else write_records([record])}
    separate, answering = question.startswith("separate"), False
    canned.running += 1
    canned.most = max(canned.most, canned.running)
    try:
        for number, piece in enumerate(pieces, 1):
            name = "reasoning_content" if separate and not answering else "content"
            if separate and piece in ("<think>", "</think>"):
                answering = piece == "</think>"
                continue
            canned.evictions += piece == "<|summary_end|>"
            yield _event(tokens, number, {name: piece})
            if canned.gap:
                await asyncio.sleep(canned.gap)
        if question == "hang":
            await asyncio.sleep(3600)
        yield _event(tokens, len(pieces), {}, "stop", told)
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        canned.left.append(question)
        raise
    finally:
        canned.running -= 1


def _event(
    tokens: Tokens, number: int, delta: dict[str, str], end: str | None = None, metadata: Any = None
) -> str:
    usage = {"prompt_tokens": tokens.prompt_len, "completion_tokens": number}
    choice = {"index": 0, "delta": delta, "finish_reason": end}
    event = {"id": "1", "choices": [choice], "usage": usage, "metadata": metadata}
    return f"data: {json.dumps(event)}\n\n"
