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

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from memento_pipeline.lock import FolderLock
from memento_pipeline.records import Rejected, Status, Trace, Usage
from memento_pipeline.writer import GroupCommit
from memento_sgl.errors import StoreError

FILE_NAME = "store.sqlite"
SCHEMA_VERSION = "1"
STAGES = ("split", "score", "segment", "summarize")
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS traces (
    id TEXT PRIMARY KEY, ordinal INTEGER NOT NULL, digest TEXT NOT NULL, run INTEGER NOT NULL,
    trace TEXT NOT NULL, status TEXT, reason TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS traces_in_order ON traces (ordinal, id);
CREATE TABLE IF NOT EXISTS results (
    trace_id TEXT NOT NULL, stage TEXT NOT NULL, result TEXT NOT NULL, usage TEXT NOT NULL,
    PRIMARY KEY (trace_id, stage)
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, trace_id TEXT NOT NULL, stage TEXT NOT NULL, model TEXT NOT NULL,
    text TEXT NOT NULL, finish_reason TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, dollars REAL
) STRICT;
CREATE TABLE IF NOT EXISTS rejected (
    file TEXT NOT NULL, row INTEGER NOT NULL, reason TEXT NOT NULL, excerpt TEXT NOT NULL, id TEXT,
    PRIMARY KEY (file, row)
) STRICT;
"""

Settings = Mapping[str, Mapping[str, Any]]
"""Stage to the options that decide its result; JSON values only."""


class Seen(Enum):
    """What the store knows about a trace that is offered to it."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    DUPLICATE = "duplicate"  # the same id and content came earlier in this run


class Admission(NamedTuple):
    id: str  # may differ from the id given, when another trace has that one
    seen: Seen


class StageResult(NamedTuple):
    result: str  # JSON of the stage's record
    usage: Usage


class StoredAnswer(NamedTuple):
    """A received answer; the counts are None where the endpoint did not tell them."""

    key: str
    trace_id: str  # the trace that paid
    stage: str
    model: str
    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    dollars: float | None


class Spent(NamedTuple):
    """All answers of the store together; `unknown` of them came without a usage report."""

    answers: int
    unknown: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float


def digest_of(trace: Trace) -> str:
    """Hash of what a trace says, without its id and where it was found."""
    said = trace.model_dump_json(exclude={"id", "provenance"})
    return hashlib.sha256(said.encode()).hexdigest()


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
        run = self._meta_of(db, "run") or "0"
        first_redone = min((STAGES.index(stage) for stage in redo), default=len(STAGES))
        dropped = STAGES[first_redone:]
        _settle(db, settings, dropped, self.folder)
        if dropped:
            # A trace filtered while it was read has no results and keeps its status.
            db.execute(
                "UPDATE traces SET status = NULL, reason = NULL WHERE status IS NOT NULL "
                "AND id IN (SELECT trace_id FROM results)"
            )
        for stage in dropped:
            db.execute("DELETE FROM results WHERE stage = ?", (stage,))
        _set_meta(db, "schema", SCHEMA_VERSION)
        _set_meta(db, "run", str(int(run) + 1))

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
        a different trace has the id already, the new one gets `-` and a part of its hash."""
        digest = digest_of(trace)
        return await self.write(lambda db: _admit(db, self.run, trace, ordinal, digest))

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
        sql = "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
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
        while page := self._reader.execute(sql, place).fetchall():
            for *_, status, trace in page:
                if wanted is None or status in wanted:
                    yield Trace.model_validate_json(trace)
            place = (page[-1][0], page[-1][1])

    def rejected(self) -> Iterator[Rejected]:
        rows = self._reader.execute(
            "SELECT file, row, reason, excerpt, id FROM rejected ORDER BY file, row"
        )
        names = ("file", "row", "reason", "excerpt", "id")
        for row in rows.fetchall():
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

    def retry_failed(self) -> int:
        """Make failed traces unfinished again; returns how many."""
        sql = "UPDATE traces SET status = NULL, reason = NULL WHERE status = 'failed'"
        return self.write_now(lambda db: db.execute(sql).rowcount)


def _set_meta(db: sqlite3.Connection, key: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _settle(
    db: sqlite3.Connection, settings: Settings, dropped: Iterable[str], folder: Path
) -> None:
    """Record settings, or refuse those that differ from the recorded ones."""
    changes = []
    for stage, options in settings.items():
        row = db.execute("SELECT value FROM meta WHERE key = ?", (f"settings.{stage}",)).fetchone()
        if row is not None and stage not in dropped:
            changes += [f"{stage}: {change}" for change in _changes(json.loads(row[0]), options)]
    if changes:
        raise StoreError(
            f"{folder} was made with other settings ({'; '.join(changes)}): give the old ones, "
            "choose another --out, or redo that stage with --redo STAGE"
        )
    for stage, options in settings.items():
        _set_meta(db, f"settings.{stage}", json.dumps(options, sort_keys=True))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _admit(db: sqlite3.Connection, run: int, trace: Trace, ordinal: int, digest: str) -> Admission:
    name = trace.id
    while True:
        row = db.execute("SELECT digest, run, status FROM traces WHERE id = ?", (name,)).fetchone()
        if row is None:
            stored = trace.model_copy(update={"id": name}).model_dump_json()
            db.execute(
                "INSERT INTO traces VALUES (?, ?, ?, ?, ?, NULL, NULL)",
                (name, ordinal, digest, run, stored),
            )
            return Admission(name, Seen.NEW)
        known, last_run, status = row
        if known == digest:
            break
        name = f"{name}-{digest[:12]}"
    if status is not None:
        return Admission(name, Seen.FINISHED if last_run != run else Seen.DUPLICATE)
    if last_run == run:
        return Admission(name, Seen.DUPLICATE)
    db.execute("UPDATE traces SET run = ? WHERE id = ?", (run, name))
    return Admission(name, Seen.UNFINISHED)
