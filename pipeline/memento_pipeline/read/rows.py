"""Stage 1: rows of JSON, Parquet and Hugging Face dataset folders as traces, one at a time.

Bad rows and files become `Rejected` with their line or row number; nothing is skipped silently and
nothing that a file holds ends the run. Ids are the row's own, else a hash of its content. Of rows
with the same id and the same content the first is kept and the others are rejected as duplicates;
the same id with other content gets `~` and a hash of the content appended. Seen ids live in a
temporary file, so memory does not grow with the input.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field

from memento_pipeline.read.columns import ROLES
from memento_pipeline.read.files import list_files
from memento_pipeline.read.row_parts import Choose
from memento_pipeline.read.said import RowError
from memento_pipeline.read.shapes import to_traces
from memento_pipeline.records import Record, Rejected, Trace
from memento_pipeline.text.tokens import TokenCounter, count
from memento_sgl.errors import ConfigError
from memento_sgl.offline.inputs.rows import Broken, count_values, read_values

log = logging.getLogger(__name__)

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_EXCERPT = 200


class ReadOptions(Record):
    """Column names where they differ from the known ones, and which traces to leave out."""

    columns: dict[str, str] = Field(default_factory=dict)  # see `ROLES`, for example {"id": "key"}
    require_closed: bool = True  # leave out thoughts that never reach `</think>`
    keep_blocks: bool = False  # of rows that have blocks: only their mementos are made anew
    require_answer: bool = False  # leave out traces without an answer
    generations: Choose | None = None  # of several; None: the first that is right, if known
    split: str | None = Field(default=None, min_length=1)  # of folders; None: train
    drop_cjk: bool = False  # leave out thoughts with Chinese, Japanese or Korean characters
    min_tokens: int = Field(default=200, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)


def read_traces(
    paths: Sequence[Path], options: ReadOptions | None = None, *, out: Path | None = None
) -> Iterator[Trace | Rejected]:
    """All traces of files and folders in order; folders are read in the order of their file names.

    Args:
        out: the folder that the run writes to: what it wrote is no input.

    Raises:
        ConfigError: a path does not exist or is of an unknown kind; an unknown column role.
    """
    options = options or ReadOptions()
    if unknown := set(options.columns) - set(ROLES):
        raise ConfigError(f"unknown column roles {sorted(unknown)}: there are {', '.join(ROLES)}")
    files = list_files(paths, split=options.split, out=out)
    with closing(sqlite3.connect("")) as database:  # "": a temporary file of SQLite's own
        seen = database.cursor()
        seen.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, content TEXT, place TEXT)")
        for file in files:
            name = _printable(str(file))
            for number, row in _values(file):
                yield from _one(name, number, row, options, seen)


def count_rows(
    paths: Sequence[Path], options: ReadOptions | None = None, *, out: Path | None = None
) -> int | None:
    """Rows in all files, for a progress bar; None when that takes reading them."""
    split = options.split if options else None
    counts = [count_values(file) for file in list_files(paths, split=split, out=out)]
    return None if None in counts else sum(count or 0 for count in counts)


def why_filtered(trace: Trace, options: ReadOptions, counter: TokenCounter) -> str | None:
    """The reason to leave the trace out, None to keep it."""
    if not trace.problem.strip():
        return "empty problem"
    if options.require_closed and not trace.closed:
        return "no </think>"
    if not trace.thought.strip():
        return "empty thought"
    if options.require_answer and not trace.answer.strip():
        return "no answer: name its column with --column answer=NAME"
    if options.drop_cjk and _CJK.search(trace.thought):
        return "CJK characters"
    tokens = count(counter, trace.thought)
    if tokens < options.min_tokens:
        return f"too short: {tokens} of at least {options.min_tokens} tokens"
    if options.max_tokens is not None and tokens > options.max_tokens:
        return f"too long: {tokens} of at most {options.max_tokens} tokens"
    return None


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file; whatever ends the reading of one file, the others are read."""
    number = 0
    try:
        for number, value in read_values(file):
            yield number, value
    except Exception as error:
        log.exception("a file broke", extra={"file": str(file)})
        yield number + 1, Broken(f"{file.name} cannot be read: {type(error).__name__}: {error}")


def _one(
    file: str, number: int, value: Any, options: ReadOptions, seen: sqlite3.Cursor
) -> Iterator[Trace | Rejected]:
    """The traces of one row, or why there are none. Nothing that a row holds ends the run."""
    try:
        if isinstance(value, Broken):
            raise RowError(value.reason, value.excerpt)
        if not isinstance(value, dict):
            raise RowError(f"expected an object, got {type(value).__name__}")
        place = {"file": file, "row": number}
        for trace, content in to_traces(value, options.columns, place, options.generations):
            yield _unique(trace, content, seen)
    except RowError as error:
        excerpt = error.excerpt or ("" if isinstance(value, Broken) else _shown(value))
        reason = _printable(str(error))
        yield Rejected(file=file, row=number, reason=reason, excerpt=_printable(excerpt, _EXCERPT))
    except Exception as error:  # the safety net: a shape that nobody thought of
        log.exception("a row broke", extra={"file": file, "row": number})
        reason = f"cannot be read: {type(error).__name__}: {_printable(str(error), _EXCERPT)}"
        yield Rejected(file=file, row=number, reason=reason)


def _unique(trace: Trace, content: str, seen: sqlite3.Cursor) -> Trace | Rejected:
    place = trace.provenance
    at = f"{place['file']}:{place['row']}"
    for name in (trace.id, f"{trace.id}~{content[:8]}"):
        row = (name, content, at)
        if seen.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", row).rowcount:
            return trace if name == trace.id else trace.model_copy(update={"id": name})
        known = seen.execute("SELECT content, place FROM seen WHERE id = ?", (name,)).fetchone()
        if known[0] == content:
            break
    reason = f"duplicate of {os.path.basename(known[1])}"
    return Rejected(file=place["file"], row=place["row"], reason=reason, id=trace.id)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:
        return f"{type(value).__name__}, nested too deeply to be shown"


def _printable(text: str, most: int | None = None) -> str:
    return text[:most].encode("utf-8", "backslashreplace").decode("utf-8")
