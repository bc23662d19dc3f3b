"""`kill -9` at 50 random moments of a run, then resume: the same rows, no received answer paid
again.

An answer counts as received once its transaction is committed; what was in flight at the kill may
have been paid, nobody can know, and is asked again: at most `concurrency` requests a kill.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from memento_pipeline.run.convert import Exit
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_pipeline.store.folder import FILE_NAME
from scenes import FAST, SERVER, options, result_of, run, server_process, stats, write_traces

TRACES = 200
KILLS = 50
CONCURRENCY = 8
OPEN_GATE = SummarizeOptions(gate_mean=0, gate_least=0)


def work(folder: str, traces: str, url: str) -> None:
    ask = FAST.model_copy(update={"concurrency": CONCURRENCY, "timeout": 30.0})
    run(options(Path(folder), Path(traces), url, ask=ask, summarize=OPEN_GATE))


def stored_keys(folder: Path) -> set[str]:
    """What the store holds at this moment, read beside it as a later process would."""
    if not (folder / FILE_NAME).exists():
        return set()
    connection = sqlite3.connect(folder / FILE_NAME)
    try:
        return {key for (key,) in connection.execute("SELECT key FROM answers")}
    except sqlite3.OperationalError:  # killed before there were tables
        return set()
    finally:
        connection.close()


def wait_for(process: BaseProcess, folder: Path, answers: int) -> None:
    """Until the process has stored so many answers; negative: a moment of its start."""
    if answers < 0:
        process.join(-answers * 0.1)
        return
    wanted = len(stored_keys(folder)) + answers
    while process.exitcode is None and len(stored_keys(folder)) < wanted:
        time.sleep(0.01)


@pytest.mark.timeout(300)
def test_kill_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SERVER.parent), prepend=os.pathsep)
    traces = write_traces(tmp_path / "traces.jsonl", TRACES, paragraphs=10)
    with server_process(latency=0.08, jitter=0.5) as url:
        api = f"{url}/v1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["memento_pipeline.run.convert", "fault_server", "scenes"])
        draw = random.Random(7)
        kills, repeated = 0, 0
        received: dict[str, int] = {}  # key -> times the server had answered it at that time
        while True:
            job = (str(tmp_path / "killed"), str(traces), api)
            process = context.Process(target=work, args=job)
            process.start()
            if kills < KILLS:
                wait_for(process, tmp_path / "killed", draw.randrange(-4, 14))
                process.join(draw.uniform(0.0, 0.1))
            else:
                process.join()
            if process.exitcode is not None:
                break
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += 1
            time.sleep(0.15)  # answers on their way are counted before the next start
            answered = stats(url)["by_key"]
            for key in stored_keys(tmp_path / "killed"):
                before = received.setdefault(key, answered[key])
                assert answered[key] == before, "a received answer was asked for again"
            repeated = sum(answered.values()) - len(answered)
            assert repeated <= kills * CONCURRENCY
        assert process.exitcode == 0
        assert kills == KILLS, f"the run ended after {kills} kills: make it longer"
        answered = stats(url)["by_key"]
        assert all(answered[key] == times for key, times in received.items())
        assert len(received) > TRACES, "the kills came too early to tell"

        straight = run(options(tmp_path / "straight", traces, api, summarize=OPEN_GATE))
    assert straight.exit is Exit.OK
    rows = result_of(tmp_path / "straight")
    assert len(rows) == TRACES
    assert result_of(tmp_path / "killed") == rows
    assert stored_keys(tmp_path / "killed") == stored_keys(tmp_path / "straight")
