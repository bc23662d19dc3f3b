"""`memento serve demo` as a user types it: memory of all its processes, and how Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from memento_sgl.cpu.memory import KV_BYTES, RUNNING, default_memory
from memento_sgl.demo.server import free_port

MOST = 3.5 * 2**30  # bytes, PSS


def test_the_default_pool_serves_the_model_and_no_more() -> None:
    small = default_memory(1536, 4096)
    assert small == (RUNNING * 4096, RUNNING)
    assert default_memory(147456, 40960).tokens == KV_BYTES // 147456
    assert default_memory(1536, 4096, running=2) == (8192, 2)


@pytest.mark.server
def test_memory_and_ctrl_c(tmp_path: Path) -> None:
    pytest.importorskip("sglang")
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [sys.executable, "-m", "memento_sgl.cli.app", "serve", "demo", "--port", str(port)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes = [psutil.Process(server.pid)]
    try:
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        body = {"text": "Digit sum mod 100? a1", "sampling_params": {"max_new_tokens": 8}}
        assert httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60).is_success
        processes += processes[0].children(recursive=True)
        assert len(processes) >= 3
        assert sum(process.memory_full_info().pss for process in processes) < MOST
        before = log.read_text()
        assert before.count("131,072 KV tokens (192 MiB) for 32 requests at once") == 1
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        assert server.wait(30) == 130
        assert not psutil.wait_procs(processes, timeout=10)[1]
        assert log.read_text()[len(before) :] == "memento: stopped\n"
    finally:
        for process in processes:
            if process.is_running():
                process.kill()
