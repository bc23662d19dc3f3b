"""Files and folders as a stream of traces; bad rows come along with their reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memento_sgl.errors import ConfigError, DataError
from memento_sgl.offline.inputs.formats import Trace, traces_of
from memento_sgl.offline.inputs.rows import (
    LINES,
    TABLES,
    Broken,
    Unreadable,
    count_values,
    named_like,
    parse_json,
    read_values,
)

STDIN = Path("-")
TEXT = (".txt", ".md")
KINDS = (*LINES, *TABLES, ".json", *TEXT)  # of files with the same stem the first is read
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
            if path != STDIN and not named_like(path, KINDS):
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
        kind = next((i for i, kind in enumerate(KINDS) if named_like(file, (kind,))), None)
        if kind is None or not file.is_file() or file.name.startswith("."):
            continue
        stem = file.with_name(file.name[: -len(KINDS[kind])])
        best[stem] = min(best.get(stem, (kind, file)), (kind, file))
    if not best:
        raise ConfigError(f"{folder} holds no {', '.join(KINDS)} file")
    return [file for _, file in best.values()]


def count_rows(files: Sequence[Path]) -> int | None:
    """Rows of files for a progress bar; None when that takes reading them all."""
    total = 0
    for file in files:
        if file == STDIN:
            return None
        count = count_values(file) if named_like(file, (*LINES, *TABLES)) else 1
        if count is None:
            return None
        total += count
    return total


def read_traces(files: Sequence[Path]) -> Iterator[Trace | BadRow]:
    """All requests of the files, in order. A file that cannot be read is a bad row that names it;
    the others are read."""
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
    """The value itself. Errors are raised here, where a row's place is known."""
    if isinstance(value, Broken):
        raise DataError(value.reason)
    if isinstance(value, _Text):
        return {"text": value.text}
    if isinstance(value, dict):
        bad = next((name for name, cell in value.items() if isinstance(cell, Unreadable)), None)
        if bad is not None:
            raise DataError(f"column {bad!r} cannot be read: {value[bad].reason}")
    return value


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbered values of a file, as `_parsed` takes them."""
    if file != STDIN and named_like(file, (*LINES, *TABLES)):
        yield from read_values(file)
        return
    try:
        data = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
    except OSError as error:
        yield 1, Broken(f"{file.name} cannot be read: {error}")
        return
    prose = data.lstrip()[:1] not in (b"{", b"[")
    is_text = named_like(file, TEXT) or (file == STDIN and prose)
    yield from [(1, _decoded(data))] if is_text else _whole(data)


def _whole(data: bytes) -> Iterator[tuple[int, Any]]:
    """One JSON value, a list of them, or JSON lines."""
    value = parse_json(data)
    if isinstance(value, Broken):
        lines = [(i, line) for i, line in enumerate(data.splitlines(), 1) if line.strip()]
        one_value = len(lines) < 2 or lines[0][1].strip() in (b"{", b"[")
        yield from [(1, value)] if one_value else ((i, parse_json(line)) for i, line in lines)
        return
    several = isinstance(value, list) and value and isinstance(value[0], dict | list)
    yield from enumerate(value, 1) if several else [(1, value)]


def _decoded(data: bytes) -> _Text | Broken:
    try:
        return _Text(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8: {error}")
