"""The store: nothing lost, nothing twice, one process at a time, one set of settings."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from memento_pipeline.records import Rejected, Status, Trace, Usage
from memento_pipeline.store.folder import FILE_NAME, Store
from memento_pipeline.store.schema import Seen, StoredAnswer
from memento_pipeline.store.writer import GroupCommit

from memento_sgl.errors import StoreError

SETTINGS = {"split": {"tokenizer": "a"}, "score": {"model": "m", "window": 16}}


def trace(name: str = "t", thought: str = "one two") -> Trace:
    return Trace(id=name, problem="p", thought=thought)


def stored(key: str, **changes: object) -> StoredAnswer:
    answer = StoredAnswer(key, "t", "score", "m", "text", "stop", 10, 5, 0.5)
    return answer._replace(**changes)


async def test_results_survive_a_restart(tmp_path: Path) -> None:
    usage = Usage(calls=2, prompt_tokens=None, completion_tokens=3)
    with Store(tmp_path, SETTINGS) as store:
        assert await store.admit(trace(), 0) == ("t", Seen.NEW)
        await store.finish_stage("t", "split", "{}", usage)
        await store.keep_answer(stored("k"))
        await store.reject(Rejected(file="f", row=3, reason="no thought"))
    with Store(tmp_path, SETTINGS) as store:
        assert store.results("t") == {"split": ("{}", usage)}
        assert store.answer("k") == stored("k")
        assert [row.row for row in store.rejected()] == [3]
        assert await store.admit(trace(), 0) == ("t", Seen.UNFINISHED)
        await store.finish("t", Status.OK, None)
        assert store.status("t") == (Status.OK, None)
    with Store(tmp_path) as store:
        assert await store.admit(trace(), 0) == ("t", Seen.FINISHED)
        assert store.counts() == {"ok": 1, "rejected": 1}


async def test_ids_collide_without_loss(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        first = await store.admit(trace(thought="a"), 0)
        second = await store.admit(trace(thought="b"), 1)
        again = await store.admit(trace(thought="b"), 2)
        assert first == ("t", Seen.NEW)
        assert second.seen is Seen.NEW
        assert second.id.startswith("t~")
        assert again == (second.id, Seen.DUPLICATE)
    with Store(tmp_path) as store:  # the same ids on the next run, in any order
        assert await store.admit(trace(thought="b"), 1) == (second.id, Seen.UNFINISHED)
        assert await store.admit(trace(thought="a"), 0) == ("t", Seen.UNFINISHED)
        assert [t.thought for t in store.traces()] == ["a", "b"]


async def test_traces_come_in_input_order_and_by_status(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for ordinal in reversed(range(150)):
            await store.admit(trace(f"t{ordinal}", str(ordinal)), ordinal)
        await store.finish("t7", Status.FAILED, "because")
        assert [t.thought for t in store.traces()] == [str(n) for n in range(150)]
        assert [t.id for t in store.traces(only=[Status.FAILED])] == ["t7"]
        assert len(list(store.traces(only=[None]))) == 149
        assert store.retry_failed() == 1
        assert store.status("t7") == (None, None)


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    Store(tmp_path, SETTINGS).close()
    changed = {"score": {"model": "other", "window": 16}}
    with pytest.raises(StoreError, match=r"score: model was 'm', now 'other'"):
        Store(tmp_path, changed)
    with Store(tmp_path, {"segment": {"penalty": 0.5}}) as store:  # a stage that was not run yet
        assert store.settings == SETTINGS | {"segment": {"penalty": 0.5}}


async def test_redoing_a_stage_drops_it_and_what_follows(tmp_path: Path) -> None:
    with Store(tmp_path, SETTINGS) as store:
        await store.admit(trace(), 0)
        for stage in ("split", "score", "segment", "summarize"):
            await store.finish_stage("t", stage, "{}", Usage())
        await store.finish("t", Status.OK, None)
        await store.admit(trace("short"), 1)
        await store.finish("short", Status.FILTERED, "too short")
    changed = {"score": {"model": "other"}}
    with Store(tmp_path, changed, redo=["score"]) as store:
        assert list(store.results("t")) == ["split"]
        assert store.status("t") == (None, None)
        assert store.status("short") == (Status.FILTERED, "too short")
        assert store.settings["score"] == {"model": "other"}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from memento_pipeline.store.folder import Store\n"
    code += "Store(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match=f"in use by process {other.pid}"):
        Store(tmp_path)
    other.kill()
    other.wait()
    Store(tmp_path).close()  # the lock ended with its process


def test_a_missing_folder_is_not_made_for_later_stages(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no store\.sqlite"):
        Store(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def fill(folder: Path, rows: int, *, close: bool = True) -> None:
    """Write `rows` answers, one commit each; without `close` the WAL stays, as after a kill."""

    async def write(store: Store) -> None:
        for number in range(rows):
            await store.keep_answer(stored(f"k{number}", text="x" * 500))

    store = Store(folder)
    asyncio.run(write(store))
    if close:
        store.close()
    else:
        copy = folder.with_name(folder.name + "-copy")
        shutil.copytree(folder, copy)
        store.close()


def test_a_torn_log_loses_only_its_end(tmp_path: Path) -> None:
    fill(tmp_path / "a", 60, close=False)
    wal = tmp_path / "a-copy" / (FILE_NAME + "-wal")
    whole = wal.read_bytes()
    assert len(whole) > 60_000
    for part in (0.2, 0.5, 0.77, 0.999):
        folder = tmp_path / f"torn{part}"
        shutil.copytree(tmp_path / "a-copy", folder)
        (folder / wal.name).write_bytes(whole[: int(len(whole) * part)])
        (folder / (FILE_NAME + "-shm")).unlink(missing_ok=True)
        with Store(folder) as store:
            kept = [number for number in range(60) if store.answer(f"k{number}")]
        assert kept == list(range(len(kept)))
        assert len(kept) > 60 * part - 25


def test_a_damaged_file_is_refused_with_advice(tmp_path: Path) -> None:
    fill(tmp_path, 60)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"is damaged.*\.recover"):
        Store(tmp_path)
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="is damaged"):
        Store(tmp_path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="schema version 99"):
        Store(tmp_path)


FILL_UNTIL_FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from memento_pipeline.store.schema import StoredAnswer
from memento_pipeline.store.folder import Store
from memento_sgl.errors import StoreError

async def write(store):
    for number in range(10_000):
        try:
            row = (f"k{number}", "t", "s", "m", "x" * 2000, None, None, None, None)
            await store.keep_answer(StoredAnswer(*row))
        except StoreError as error:
            print(number, error, flush=True)
            return

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Store(Path(sys.argv[1])) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    asyncio.run(write(store))
"""


class Dying(sqlite3.Connection):
    """A connection to a disk that is gone: nothing can be committed, nor rolled back."""

    def execute(self, sql: str, *rest: object) -> sqlite3.Cursor:  # type: ignore[override]
        if sql in ("COMMIT", "ROLLBACK"):
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *rest)  # type: ignore[arg-type]


@pytest.mark.timeout(60)
def test_nobody_waits_for_a_writer_that_cannot_go_on(tmp_path: Path) -> None:
    def connect() -> sqlite3.Connection:
        return sqlite3.connect(tmp_path / "x", isolation_level=None, factory=Dying)

    writer = GroupCommit(connect)
    for _ in range(3):
        with pytest.raises(StoreError, match="disk I/O error"):
            writer.submit(lambda db: db.execute("CREATE TABLE IF NOT EXISTS t (a)")).result(20)
    given_up = writer.submit(lambda db: None)
    given_up.cancel()
    writer.close()


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    assert hasattr(signal, "SIGXFSZ")
    assert resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", FILL_UNTIL_FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    number, message = done.stdout.split(" ", 1)
    assert "could not be written" in message
    assert "run the command again" in message
    with Store(tmp_path) as store:
        assert store.spent().answers == int(number) > 20
        store.write_now(lambda db: db.execute("DELETE FROM answers"))


def test_a_killed_writer_loses_nothing_it_confirmed(tmp_path: Path) -> None:
    code = "import asyncio, sys; from pathlib import Path\n"
    code += "from memento_pipeline.store.schema import StoredAnswer\n"
    code += "from memento_pipeline.store.folder import Store\n"
    code += "async def main(store):\n    for n in range(10**6):\n"
    code += (
        "        await store.keep_answer(StoredAnswer(f'k{n}', 't', 's', 'm', 'x', *[None]*4))\n"
    )
    code += "        print(n, flush=True)\nasyncio.run(main(Store(Path(sys.argv[1]))))"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    for _ in range(30):
        other.stdout.readline()
    os.kill(other.pid, signal.SIGKILL)
    confirmed = [int(line) for line in other.stdout.read().split()] or [29]
    other.wait()
    with Store(tmp_path) as store:
        assert all(store.answer(f"k{number}") for number in range(confirmed[-1] + 1))


async def test_writes_share_commits_and_fail_alone_with_their_batch(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        await asyncio.gather(*(store.keep_answer(stored(f"k{n}")) for n in range(300)))
        assert store.spent() == (300, 0, 3000, 1500, 150.0)
        with pytest.raises(StoreError, match="UNIQUE"):
            await store.keep_answer(stored("k1"))
        await store.keep_answer(stored("after"))
        assert store.answer("after") is not None


async def test_a_cancelled_write_is_still_made(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        task = asyncio.create_task(store.keep_answer(stored("paid")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    with Store(tmp_path) as store:
        assert store.answer("paid") is not None
