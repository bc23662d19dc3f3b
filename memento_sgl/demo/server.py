"""Start and stop a real server as a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from memento_sgl.errors import MementoError


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def serve_command(model: str, *flags: str) -> list[str]:
    """Command line of `memento serve MODEL FLAGS` in this Python."""
    return [sys.executable, "-m", "memento_sgl.cli.app", "serve", model, *flags]


@contextlib.contextmanager
def running_server(
    command: Sequence[str],
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    timeout: float = 240.0,
) -> Iterator[str]:
    """Run a server command on a free port; yields the base URL.

    All processes it started are gone when the block is left, by SIGTERM too.

    Raises:
        MementoError: it ended or was not ready within `timeout` seconds; holds the log's end.
    """
    port = free_port()
    with _sigterm_unwinds(), log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, timeout)
            yield url
        finally:
            _stop(process)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM leave the block like Ctrl-C, unless the program has its own handler for it."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MementoError(
                f"the server ended with code {process.returncode}; end of its log:\n{_end(log)}"
            )
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise MementoError(f"the server was not ready after {timeout:.0f} s:\n{_end(log)}")


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole session that was started here, politely first."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
