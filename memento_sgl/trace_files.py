"""Files and folders as a stream of traces; bad rows come along with their reason."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from memento_sgl.errors import ConfigError, DataError
from memento_sgl.trace_formats import Trace, traces_of

STDIN = Path("-")
TEXT = (".txt", ".md")
LINES = (".jsonl", ".ndjson", ".jsonl.gz")
KINDS = (*LINES, ".parquet", ".json", *TEXT)  # of files with the same stem the first is read
WORK_ROWS = "default"
"""Of a work folder of `memento convert` its rows are read from here: the others are the same."""


class BadRow(NamedTuple):
    """A row that is no trace. `row` counts from 1."""

    file: str
    row: int
    reason: str


def list_trace_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name or hold; `-` is standard input.

    Raises:
        ConfigError: a path is missing, of an unknown kind, or a folder without such files.
    """
    files: list[Path] = []
    for path in paths:
        if path == STDIN or path.is_file():
            if path != STDIN and not path.name.endswith(KINDS):
                raise ConfigError(f"{path}: not one of the known kinds {', '.join(KINDS)}")
            files.append(path)
        elif path.is_dir():
            files += _in_folder(path)
        else:
            raise ConfigError(f"no such file or folder: {path}")
    return files


def _in_folder(folder: Path) -> list[Path]:
    rows = folder / WORK_ROWS
    root = rows if (folder / "store.sqlite").is_file() and rows.is_dir() else folder
    best: dict[Path, tuple[int, Path]] = {}
    for file in sorted(root.rglob("*")):
        kind = next((i for i, kind in enumerate(KINDS) if file.name.endswith(kind)), None)
        if kind is None or not file.is_file() or file.name.startswith("."):
            continue
        stem = file.with_name(file.name.removesuffix(KINDS[kind]))
        best[stem] = min(best.get(stem, (kind, file)), (kind, file))
    if not best:
        raise ConfigError(f"{folder} holds no {', '.join(KINDS)} file")
    return [file for _, file in best.values()]


def count_rows(files: Sequence[Path]) -> int | None:
    """Rows of files for a progress bar; None when that takes reading them all.

    Raises:
        DataError: a Parquet file that cannot be read.
    """
    total = 0
    for file in files:
        if file == STDIN or file.name.endswith(".gz"):
            return None
        if file.suffix == ".parquet":
            total += _table_size(file)
        elif file.name.endswith(LINES):
            with file.open("rb") as lines:
                total += sum(1 for line in lines if line.strip())
        else:
            total += 1
    return total


def read_traces(files: Sequence[Path]) -> Iterator[Trace | BadRow]:
    """All requests of the files, in order.

    Raises:
        DataError: a Parquet file that cannot be read.
    """
    for file in files:
        name = "stdin" if file == STDIN else file.name
        for row, value in _values(file):
            try:
                yield from traces_of(_parsed(value), f"{name}:{row}")
            except DataError as error:
                yield BadRow(str(file), row, str(error))


class _Text(NamedTuple):
    """A whole text file."""

    text: str


def _parsed(value: Any) -> Any:
    """The value itself; bytes are JSON. Errors are raised here, where a row's place is known."""
    if isinstance(value, DataError):
        raise value
    if isinstance(value, _Text):
        return {"text": value.text}
    return _json(value) if isinstance(value, bytes) else value


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}") from None


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbered values of a file, as `_parsed` takes them."""
    if file.suffix == ".parquet":
        yield from _table(file)
    elif file.name.endswith(LINES):
        yield from _lines(file)
    else:
        data = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
        prose = data.lstrip()[:1] not in (b"{", b"[")
        is_text = file.suffix in TEXT or (file == STDIN and prose)
        yield from [(1, _decoded(data))] if is_text else _whole(data)


def _lines(file: Path) -> Iterator[tuple[int, bytes | DataError]]:
    number = 0
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number + 1, DataError(f"the file is cut off or damaged: {error}")


def _whole(data: bytes) -> Iterator[tuple[int, Any]]:
    """One JSON value, a list of them, or JSON lines."""
    try:
        value = _json(data)
    except DataError as error:
        lines = [(i, line) for i, line in enumerate(data.splitlines(), 1) if line.strip()]
        one_value = len(lines) < 2 or lines[0][1].strip() in (b"{", b"[")
        yield from [(1, error)] if one_value else lines
        return
    several = isinstance(value, list) and value and isinstance(value[0], dict | list)
    yield from enumerate(value, 1) if several else [(1, value)]


def _decoded(data: bytes) -> _Text | DataError:
    try:
        return _Text(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: {error}")


def _table_size(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _table(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read after row {number}: {error}") from None
