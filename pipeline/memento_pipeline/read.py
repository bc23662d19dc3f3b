"""Stage 1: rows of JSONL, Parquet and Hugging Face dataset folders as traces, one at a time.

Bad rows become `Rejected` with their line or row number; nothing is skipped silently. Ids are the
row's own, else a hash of its content. Of rows with the same id and the same content the first is
kept and the others are rejected as duplicates; the same id with other content gets `~` and a hash
of the content appended. Seen ids live in a temporary file, so memory does not grow with the input.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field

from memento_pipeline._files import count_file_rows, list_files, read_rows
from memento_pipeline._shapes import ROLES, RowError, to_trace
from memento_pipeline.records import Record, Rejected, Trace
from memento_pipeline.tokens import TokenCounter, count
from memento_sgl.errors import ConfigError

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_EXCERPT = 200


class ReadOptions(Record):
    """Column names where they differ from the known ones, and which traces to leave out."""

    columns: dict[str, str] = Field(default_factory=dict)  # see `ROLES`, for example {"id": "key"}
    require_closed: bool = True  # leave out thoughts that never reach `</think>`
    keep_blocks: bool = False  # of rows that have blocks: only their mementos are made anew
    drop_cjk: bool = False  # leave out thoughts with Chinese, Japanese or Korean characters
    min_tokens: int = Field(default=200, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)


def read_traces(
    paths: Sequence[Path], options: ReadOptions | None = None
) -> Iterator[Trace | Rejected]:
    """All rows of files and folders in order; folders are read in the order of their file names.

    Raises:
        ConfigError: a path does not exist or is of an unknown kind; an unknown column role.
        DataError: a Parquet or Arrow file that cannot be read.
    """
    options = options or ReadOptions()
    if unknown := set(options.columns) - set(ROLES):
        raise ConfigError(f"unknown column roles {sorted(unknown)}: there are {', '.join(ROLES)}")
    files = list_files(paths)
    with closing(sqlite3.connect("")) as seen:  # "": a temporary file of SQLite's own
        seen.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, content TEXT, place TEXT)")
        for file in files:
            for number, row in read_rows(file):
                yield _one(file, number, row, options.columns, seen)


def count_rows(paths: Sequence[Path]) -> int | None:
    """Rows in all files, for a progress bar; None when that takes decompressing them."""
    counts = [count_file_rows(file) for file in list_files(paths)]
    return None if None in counts else sum(count or 0 for count in counts)


def why_filtered(trace: Trace, options: ReadOptions, counter: TokenCounter) -> str | None:
    """The reason to leave the trace out, None to keep it."""
    if options.require_closed and not trace.closed:
        return "no </think>"
    if not trace.thought.strip():
        return "empty thought"
    if options.drop_cjk and _CJK.search(trace.thought):
        return "CJK characters"
    tokens = count(counter, trace.thought)
    if tokens < options.min_tokens:
        return f"too short: {tokens} of at least {options.min_tokens} tokens"
    if options.max_tokens is not None and tokens > options.max_tokens:
        return f"too long: {tokens} of at most {options.max_tokens} tokens"
    return None


def _one(
    file: Path,
    number: int,
    row: Mapping[str, Any] | RowError,
    columns: Mapping[str, str],
    seen: sqlite3.Connection,
) -> Trace | Rejected:
    try:
        if isinstance(row, RowError):
            raise row
        trace, content = to_trace(row, columns, {"file": str(file), "row": number})
    except RowError as error:
        excerpt = error.excerpt if isinstance(row, RowError) else repr(row)
        return Rejected(file=str(file), row=number, reason=str(error), excerpt=_printable(excerpt))
    place = f"{file.name}:{number}"
    for name in (trace.id, f"{trace.id}~{content[:8]}"):
        known = seen.execute("SELECT content, place FROM seen WHERE id = ?", (name,)).fetchone()
        if known is None:
            seen.execute("INSERT INTO seen VALUES (?, ?, ?)", (name, content, place))
            return trace if name == trace.id else trace.model_copy(update={"id": name})
        if known[0] == content:
            break
    return Rejected(file=str(file), row=number, reason=f"duplicate of {known[1]}", id=trace.id)


def _printable(text: str) -> str:
    return text[:_EXCERPT].encode("utf-8", "backslashreplace").decode("utf-8")
