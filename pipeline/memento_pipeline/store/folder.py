"""The work folder: one SQLite file that holds all that was read, made and paid for.

    meta       settings by stage, schema version
    traces     the input, in order; status and reason once a trace is finished
    results    one row per finished stage of a trace
    answers    every answer of an endpoint, by the hash of its request: the request cache
    rejected   input rows that are not traces

WAL with `synchronous=FULL`: a commit is on disk before its result is used, so neither `kill -9` nor
a power cut loses a paid answer. Group commit (`writer`) makes that cheap.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from memento_pipeline.records import Rejected, Status, Trace, Usage
from memento_pipeline.store.lock import FolderLock
from memento_pipeline.store.schema import (
    SCHEMA,
    SCHEMA_VERSION,
    STAGES,
    Admission,
    Paid,
    Settings,
    Spent,
    StageResult,
    StoredAnswer,
    admit,
    digest_of,
    drop_stages,
    set_meta,
    settle,
    upgrade,
)
from memento_pipeline.store.writer import GroupCommit
from memento_sgl.errors import StoreError

FILE_NAME = "store.sqlite"


class Store:
    """An opened and locked work folder.

    Args:
        folder: made when missing, unless `create` is false.
        settings: of the stages that this run will carry out; stages not named keep theirs.
        redo: stages whose results (and those of the stages after them) are dropped first.

    Raises:
        StoreError: locked, damaged, of another version, or made with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings | None = None,
        *,
        create: bool = True,
        redo: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        if not create and not self.path.exists():
            raise StoreError(
                f"{folder} holds no {FILE_NAME}: run `memento convert` or `split` first"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            self._reader = self._connect()
            self._check()
            self._writer = GroupCommit(self._connect)
            try:
                self._writer.write_now(lambda db: self._begin(db, settings or {}, set(redo)))
            except BaseException:
                self._writer.close()
                raise
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise StoreError(self._damaged(str(error))) from None
        except BaseException:
            self._lock.release()
            raise
        self.write = self._writer.write
        self.write_now = self._writer.write_now
        self.run = int(self._meta("run") or 0)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
        self._lock.release()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=60
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _damaged(self, detail: str) -> str:
        return (
            f"{self.path} is damaged ({detail}): restore it from a backup, or rescue what is left "
            f"with `sqlite3 {self.path} .recover | sqlite3 new.sqlite`"
        )

    def _check(self) -> None:
        verdict = self._reader.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise StoreError(self._damaged(verdict))
        tables = self._reader.execute("SELECT name FROM sqlite_master").fetchall()
        version = self._meta("schema") if ("meta",) in tables else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, this program {SCHEMA_VERSION}: use "
                "the program that made it, or another --out"
            )

    def _begin(self, db: sqlite3.Connection, settings: Settings, redo: set[str]) -> None:
        for statement in SCHEMA.split(";"):
            db.execute(statement)
        upgrade(db)
        run = self._meta_of(db, "run") or "0"
        first_redone = min((STAGES.index(stage) for stage in redo), default=len(STAGES))
        dropped = STAGES[first_redone:]
        settle(db, settings, dropped, self.folder)
        if dropped:
            drop_stages(db, dropped)
        set_meta(db, "schema", SCHEMA_VERSION)
        set_meta(db, "run", str(int(run) + 1))

    def _meta(self, key: str) -> str | None:
        return self._meta_of(self._reader, key)

    @staticmethod
    def _meta_of(db: sqlite3.Connection, key: str) -> str | None:
        row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The recorded settings of all stages."""
        rows = self._reader.execute("SELECT key, value FROM meta WHERE key LIKE 'settings.%'")
        return {key.removeprefix("settings."): json.loads(value) for key, value in rows}

    async def admit(self, trace: Trace, ordinal: int) -> Admission:
        """Take a trace in, or find out that it is known. Ids are made unique, never dropped: when
        a different trace has the id already, the new one gets `~` and a part of its hash."""
        digest = digest_of(trace)
        return await self.write(lambda db: admit(db, self.run, trace, ordinal, digest))

    async def reject(self, rejected: Rejected) -> None:
        row = (rejected.file, rejected.row, rejected.reason, rejected.excerpt, rejected.id)
        sql = "INSERT OR REPLACE INTO rejected VALUES (?, ?, ?, ?, ?)"
        await self.write(lambda db: db.execute(sql, row))

    async def finish_stage(self, trace_id: str, stage: str, result: str, usage: Usage) -> None:
        row = (trace_id, stage, result, usage.model_dump_json())
        sql = "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)"
        await self.write(lambda db: db.execute(sql, row))

    async def finish(self, trace_id: str, status: Status, reason: str | None) -> None:
        row = (status.value, reason, trace_id)
        sql = "UPDATE traces SET status = ?, reason = ? WHERE id = ?"
        await self.write(lambda db: db.execute(sql, row))

    async def keep_answer(self, answer: StoredAnswer) -> None:
        sql = "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        await self.write(lambda db: db.execute(sql, answer))

    def answer(self, key: str) -> StoredAnswer | None:
        row = self._reader.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else StoredAnswer(*row)

    def results(self, trace_id: str) -> dict[str, StageResult]:
        """Finished stages of a trace."""
        rows = self._reader.execute(
            "SELECT stage, result, usage FROM results WHERE trace_id = ?", (trace_id,)
        )
        return {
            stage: StageResult(result, Usage.model_validate_json(usage))
            for stage, result, usage in rows
        }

    def status(self, trace_id: str) -> tuple[Status | None, str | None]:
        """Status and reason; both None while the trace is unfinished."""
        row = self._reader.execute(
            "SELECT status, reason FROM traces WHERE id = ?", (trace_id,)
        ).fetchone()
        if row is None:
            raise StoreError(f"no trace {trace_id!r} in {self.path}")
        return (None if row[0] is None else Status(row[0])), row[1]

    def traces(self, *, only: Iterable[Status | None] | None = None) -> Iterator[Trace]:
        """Traces in input order, read one by one; `only` picks statuses (None: unfinished)."""
        wanted = None if only is None else {status and status.value for status in only}
        place = (-1, "")
        sql = (
            "SELECT ordinal, id, status, trace FROM traces WHERE (ordinal, id) > (?, ?) "
            "ORDER BY ordinal, id LIMIT 64"
        )
        # Pages instead of one open cursor: a long read would keep the WAL from being emptied.
        with closing(self._connect()) as reader:  # of its own: it may run in another thread
            while page := reader.execute(sql, place).fetchall():
                for *_, status, trace in page:
                    if wanted is None or status in wanted:
                        yield Trace.model_validate_json(trace)
                place = (page[-1][0], page[-1][1])

    def rejected(self) -> Iterator[Rejected]:
        rows = self._reader.execute(
            "SELECT file, row, reason, excerpt, id FROM rejected ORDER BY file, row"
        )
        names = ("file", "row", "reason", "excerpt", "id")
        for row in rows:
            yield Rejected(**dict(zip(names, row, strict=True)))

    def counts(self) -> dict[str, int]:
        """Traces by status (`unfinished` where there is none yet), and `rejected` rows."""
        rows = self._reader.execute("SELECT status, count(*) FROM traces GROUP BY status")
        found = {str(status or "unfinished"): int(count) for status, count in rows}
        (rejected,) = self._reader.execute("SELECT count(*) FROM rejected").fetchone()
        return found | {"rejected": int(rejected)}

    def spent(self) -> Spent:
        """What was paid so far, in this and all earlier runs."""
        row = self._reader.execute(
            "SELECT count(*), count(*) - count(prompt_tokens + completion_tokens), "
            "coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
            "coalesce(sum(dollars), 0.0) FROM answers"
        ).fetchone()
        return Spent(*row)

    def cached_tokens(self) -> int | None:
        """Prompt tokens that endpoints read from their caches; None when none reported any."""
        row = self._reader.execute("SELECT sum(cached_tokens) FROM answers").fetchone()
        return None if row[0] is None else int(row[0])

    def bill(self) -> list[Paid]:
        """What was paid so far, by stage and model."""
        rows = self._reader.execute(
            "SELECT stage, model, count(*), sum(prompt_tokens), sum(completion_tokens), "
            "count(*) - count(prompt_tokens + completion_tokens), sum(dollars), "
            "count(*) - count(dollars), sum(cached_tokens) FROM answers "
            "GROUP BY stage, model ORDER BY min(rowid)"
        )
        return [Paid(*row) for row in rows]

    def note(self, key: str, value: str) -> None:
        """Keep a text beside the data (the options of the last run)."""
        self.write_now(lambda db: set_meta(db, f"note.{key}", value))

    def noted(self, key: str) -> str | None:
        return self._meta(f"note.{key}")

    def retry_failed(self) -> int:
        """Make failed traces unfinished again; returns how many."""
        sql = "UPDATE traces SET status = NULL, reason = NULL WHERE status = 'failed'"
        return self.write_now(lambda db: db.execute(sql).rowcount)


def peek_note(folder: Path, key: str) -> str | None:
    """A note of a folder without opening or locking it.

    Raises:
        StoreError: there is no store, or it is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        raise StoreError(f"{folder} holds no {FILE_NAME}: nothing was started there")
    connection = sqlite3.connect(path, timeout=60)
    try:
        row = connection.execute(
            "SELECT value FROM meta WHERE key = ?", (f"note.{key}",)
        ).fetchone()
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} cannot be read ({error})") from None
    finally:
        connection.close()
    return None if row is None else str(row[0])
