"""A chat server that knows nothing of mementos and is strict about what it does not know.

What it does follows from the question: "break" closes the connection in the middle, "fail" sends an
error chunk, "hang" sends a memento and part of a block and then waits for the client to go.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "right"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.refuse(404, "no such page")
        else:
            self.answer(200, {"object": "list", "data": [{"id": "a"}, {"id": "b"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.refuse(401, "wrong key")
        elif "custom_params" in body:
            self.refuse(400, "Unrecognized request argument supplied: custom_params")
        elif "continuous_usage_stats" in body["stream_options"]:
            self.refuse(400, "Unknown parameter: 'stream_options.continuous_usage_stats'")
        else:
            self.stream(body["messages"][-1]["content"])

    def stream(self, question: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if question == "hang":
            self.delta(content="<think><|block_start|>one<|block_end|><|summary_start|>1")
            self.delta(content="<|summary_end|><|block_start|>tw")
            self.rfile.read(1)  # until the client closes
            return
        self.delta(reasoning_content="Rayleigh\x1b[31m ")
        self.delta(reasoning_content="scattering")
        if question == "fail":
            self.send({"error": {"message": "out of memory"}})
            return
        if question == "break":
            self.close_connection = True
            return
        self.delta(content="Because ")
        self.delta("stop", content="of scattering.")
        self.send({"id": "1", "choices": [], "usage": USAGE})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def delta(self, finish_reason: str | None = None, **delta: str) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self.send({"id": "1", "choices": [choice]})

    def send(self, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def refuse(self, status: int, reason: str) -> None:
        self.answer(status, {"error": {"message": reason}})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


USAGE = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


@contextmanager
def plain_server() -> Iterator[str]:
    """Runs it on a free port; yields the base URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
