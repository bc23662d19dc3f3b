"""Tables of the store, what they hold, and the writes that take several steps."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from memento_pipeline.records import Trace, Usage
from memento_sgl.errors import StoreError

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
    prompt_tokens INTEGER, completion_tokens INTEGER, dollars REAL, cached_tokens INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS rejected (
    file TEXT NOT NULL, row INTEGER NOT NULL, reason TEXT NOT NULL, excerpt TEXT NOT NULL, id TEXT,
    PRIMARY KEY (file, row)
) STRICT;
"""

Settings = Mapping[str, Mapping[str, Any]]
"""Stage to the options that decide its result; JSON values only."""


_TWIN = re.compile(r"~[0-9a-f]{8}$")


class Seen(Enum):
    """What the store knows about a trace that is offered to it."""

    NEW = "new"
    EDITED = "edited"  # its row says something else than in an earlier run
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
    cached_tokens: int | None = None  # of the prompt tokens


class Spent(NamedTuple):
    """All answers of the store together; `unknown` of them came without a usage report."""

    answers: int
    unknown: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float


class Paid(NamedTuple):
    """Answers of one stage by one model. Sums are over those that reported a figure; None: none
    did."""

    stage: str
    model: str
    answers: int
    prompt_tokens: int | None
    completion_tokens: int | None
    unreported: int  # answers without a token count
    dollars: float | None
    unpriced: int  # answers without a price
    cached_tokens: int | None = None  # of the prompt tokens


def digest_of(trace: Trace) -> str:
    """Hash of what a trace says, without its id and where it was found."""
    said = trace.model_dump_json(exclude={"id", "provenance"})
    return hashlib.sha256(said.encode()).hexdigest()


def upgrade(db: sqlite3.Connection) -> None:
    """Bring the tables of an earlier version to this one; what they hold stays."""
    columns = {row[1] for row in db.execute("PRAGMA table_info(answers)")}
    if "cached_tokens" not in columns:
        db.execute("ALTER TABLE answers ADD COLUMN cached_tokens INTEGER")


def set_meta(db: sqlite3.Connection, key: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def settle(
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
        set_meta(db, f"settings.{stage}", json.dumps(options, sort_keys=True))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def admit(db: sqlite3.Connection, run: int, trace: Trace, ordinal: int, digest: str) -> Admission:
    """Take a trace in. Of its id there may be several traces: `x`, `x~` and a hash."""
    file, number = trace.provenance.get("file"), trace.provenance.get("row")
    if number is not None:  # what was no trace in an earlier run is one now
        db.execute("DELETE FROM rejected WHERE file = ? AND row = ?", (file, number))
    base = _TWIN.sub("", trace.id)
    found = db.execute(
        "SELECT id, run, status FROM traces WHERE digest = ? AND "
        "(id = ? OR id BETWEEN ? AND ?) ORDER BY id",
        (digest, base, f"{base}~", f"{base}~g"),
    ).fetchone()
    if found is not None:
        return _known(db, run, *found)
    name = trace.id
    while (row := _stored(db, name)) is not None:
        if row[0] != run and _file_of(row[1]) == file:
            return _replace(db, run, trace, name, digest)
        name = f"{name}~{digest[:8]}"
    stored = trace.model_copy(update={"id": name}).model_dump_json()
    db.execute(
        "INSERT INTO traces VALUES (?, ?, ?, ?, ?, NULL, NULL)",
        (name, ordinal, digest, run, stored),
    )
    return Admission(name, Seen.NEW)


def _stored(db: sqlite3.Connection, name: str) -> tuple[int, str] | None:
    """The last run that met a trace, and its JSON."""
    found = db.execute("SELECT run, trace FROM traces WHERE id = ?", (name,)).fetchone()
    return None if found is None else (int(found[0]), str(found[1]))


def _file_of(trace: str) -> str | None:
    file = json.loads(trace)["provenance"].get("file")
    return None if file is None else str(file)


def _known(
    db: sqlite3.Connection, run: int, name: str, last_run: int, status: str | None
) -> Admission:
    if last_run == run:
        return Admission(name, Seen.DUPLICATE)
    if status is not None:
        return Admission(name, Seen.FINISHED)
    db.execute("UPDATE traces SET run = ? WHERE id = ?", (run, name))
    return Admission(name, Seen.UNFINISHED)


def _replace(db: sqlite3.Connection, run: int, trace: Trace, name: str, digest: str) -> Admission:
    """The row of this trace was edited: the new text counts, and nothing made of the old one."""
    provenance = {**trace.provenance, "edited": True}
    stored = trace.model_copy(update={"id": name, "provenance": provenance}).model_dump_json()
    db.execute(
        "UPDATE traces SET digest = ?, run = ?, trace = ?, status = NULL, reason = NULL "
        "WHERE id = ?",
        (digest, run, stored, name),
    )
    db.execute("DELETE FROM results WHERE trace_id = ?", (name,))
    return Admission(name, Seen.EDITED)


def drop_stages(db: sqlite3.Connection, stages: Iterable[str]) -> None:
    """Forget results; their traces become unfinished. A trace that was filtered when it was read
    has no results and stays filtered."""
    marks = ", ".join("?" * len(tuple(stages)))
    ids = f"SELECT trace_id FROM results WHERE stage IN ({marks})"
    db.execute(f"UPDATE traces SET status = NULL, reason = NULL WHERE id IN ({ids})", tuple(stages))
    db.execute(f"DELETE FROM results WHERE stage IN ({marks})", tuple(stages))
