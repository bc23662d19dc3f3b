"""Rows of JSON lines, JSON arrays, Parquet and Arrow files: one row or batch in memory at a time.

What cannot be read comes along in its place: `Broken` for a row or for the rest of a file, and
`Unreadable` for one cell of a table. Nothing here raises because of what a file holds.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
JSON = (".json", ".json.gz", ".json.zst")
TABLES = (".parquet", ".arrow")

_BATCH = 64
_CHUNK = 1 << 16
_HEAD = 4096
_EXCERPT = 400
_BETWEEN = re.compile(r"[\s,]*+")
_SLACK = 16  # characters from the end of what was read at which an error may mean "read on"


class Broken(NamedTuple):
    """A row, or all that follows in a file, that cannot be read."""

    reason: str
    excerpt: str = ""


class Unreadable(NamedTuple):
    """A cell that cannot be read: not UTF-8, an impossible time."""

    reason: str


Values = Iterator[tuple[int, Any]]
"""Values with their numbers from 1; in JSON lines the numbers are those of the lines."""


def named_like(file: Path, kinds: tuple[str, ...]) -> bool:
    """Whether the name ends like one of `kinds`, in whatever case."""
    return file.name.lower().endswith(kinds)


def read_values(file: Path) -> Values:
    """All rows of a file of any kind above."""
    if named_like(file, TABLES):
        return _table(file)
    return _lines(file) if named_like(file, LINES) else _json(file)


def count_values(file: Path) -> int | None:
    """Rows of a file without parsing them; None where that takes decompressing or parsing."""
    try:
        if named_like(file, (".parquet",)):
            return int(pq.read_metadata(file).num_rows)
        if named_like(file, (".arrow",)):
            return sum(int(batch.num_rows) for batch in _arrow_batches(file))
        if named_like(file, (".jsonl", ".ndjson")):
            with file.open("rb") as lines:
                return sum(1 for line in lines if line.strip())
    except (pa.ArrowException, OSError):
        return None  # reading the file will say why
    return None


def parse_json(data: bytes) -> Any:
    """The value that `data` holds, or `Broken`.

    Pydantic's parser takes a third to a half of the time and takes nothing that Python's refuses;
    what it refuses (lone surrogates, a byte order mark, deep nesting) is for Python's to judge.
    """
    try:
        return from_json(data, cache_strings="keys")
    except ValueError:
        pass
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8: {error}", _excerpt(data))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer beyond all limits
        torn = "" if data.endswith(b"\n") else "; the line is torn off"
        return Broken(f"not valid JSON: {error}{torn}", _excerpt(data))


def _open(file: Path) -> BinaryIO:
    """The file's content, decompressed."""
    if named_like(file, (".gz",)):
        return cast(BinaryIO, gzip.open(file))
    if named_like(file, (".zst",)):
        return cast(
            BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))
        )
    return file.open("rb")


def _lines(file: Path) -> Values:
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse_json(line)
    except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
        yield number + 1, _cut(file, number, error)


def _json(file: Path) -> Values:
    """A JSON array of rows, objects that span lines, or JSON lines under another name."""
    number = 0
    try:
        with _open(file) as stream:
            head = stream.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        if not head.startswith(b"[") and head.partition(b"\n")[0].strip() != b"{":
            yield from _lines(file)
            return
        with _open(file) as stream:
            for number, value in enumerate(_JsonStream(stream).values(), start=1):
                yield number, value
    except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
        yield number + 1, _cut(file, number, error)


class _JsonStream:
    """The elements of an array, or values one after the other, of a file of any size. What is no
    JSON ends it, since nobody can say where the next value begins."""

    def __init__(self, stream: BinaryIO) -> None:
        # Bytes that are not UTF-8 become lone surrogates: they spoil their own row and no other.
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        self._decoder = json.JSONDecoder(parse_int=self._whole)
        self._buffer, self._place, self._size, self._ended = "", 0, _CHUNK, False
        self._too_long: str | None = None
        self._failed = False

    def values(self) -> Iterator[Any]:
        array = self._next() == "["
        self._place += array
        while mark := self._next():
            if array and mark == "]":
                self._place += 1
                if self._next():
                    yield Broken("text after the end of the JSON array", self._excerpt())
                return
            value = self._value()
            yield value
            if self._failed:
                return
        if array:
            yield Broken("the JSON array is cut off: it has no closing bracket")

    def _next(self) -> str:
        """The next character that is neither white space nor a comma; empty at the end."""
        while True:
            gap = _BETWEEN.match(self._buffer, self._place)
            assert gap is not None
            self._place = gap.end()
            if self._place < len(self._buffer) or not self._read():
                return self._buffer[self._place : self._place + 1]

    def _value(self) -> Any:
        self._size = _CHUNK
        while True:
            self._too_long = None
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
            except RecursionError as error:
                return self._end(f"nothing after it is read: {error}")
            except json.JSONDecodeError as error:
                # Within the last characters, or in a string, it may only mean "read on".
                cut = error.msg.startswith("Unterm") or error.pos >= len(self._buffer) - _SLACK
                if cut and self._read():
                    continue
                why = "the file is cut off" if cut else "nothing after it is read"
                return self._end(f"{why}: {error}")
            if end == len(self._buffer) and self._read():  # a number may go on
                continue
            excerpt, self._place = self._excerpt(), end
            if self._too_long is not None:
                return Broken(f"not valid JSON: {self._too_long}", excerpt)
            return value

    def _whole(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError as error:  # more digits than Python converts
            self._too_long = str(error)
            return 0

    def _read(self) -> bool:
        if self._ended:
            return False
        chunk = self._text.read(self._size)
        self._buffer, self._place = self._buffer[self._place :] + chunk, 0
        self._size *= 2
        self._ended = not chunk
        return bool(chunk)

    def _end(self, reason: str) -> Broken:
        self._failed = True
        return Broken(f"not valid JSON, {reason}", self._excerpt())

    def _excerpt(self) -> str:
        return self._buffer[self._place : self._place + _EXCERPT]


def _table(file: Path) -> Values:
    number = 0
    try:
        batches = _arrow_batches if named_like(file, (".arrow",)) else _parquet_batches
        for batch in batches(file):
            for row in _rows(batch):
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        yield number + 1, _cut(file, number, error)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return cast(list[dict[str, Any]], batch.to_pylist())
    except Exception:  # whatever a conversion raises: the cells are tried one by one
        names = batch.schema.names
        columns = [[_cell(value) for value in column] for column in batch.columns]
        return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except Exception as error:
        return Unreadable(f"{type(error).__name__}: {error}")


def _parquet_batches(file: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=_BATCH)


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source)
            yield from (table.get_batch(i) for i in range(table.num_record_batches))
            return
        for batch in reader:
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.slice(start, _BATCH)


def _cut(file: Path, number: int, error: Exception) -> Broken:
    return Broken(f"{file.name} cannot be read after row {number}, cut off or damaged: {error}")


def _excerpt(data: bytes) -> str:
    return data[:_EXCERPT].decode("utf-8", "backslashreplace")
