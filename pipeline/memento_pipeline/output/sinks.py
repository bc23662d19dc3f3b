"""Files that appear whole or not at all: written beside their name, moved there at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_BATCH = 256


class JsonlSink:
    """One JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = _part(path)
        self._file: BinaryIO = self._part.open("wb")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")

    def __enter__(self) -> JsonlSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        _finish(self._part, self.path, kind is None)


class ParquetSink:
    """A Parquet file with a fixed schema; a batch of rows is in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._part = _part(path)
        self._schema = schema
        self._writer = pq.ParquetWriter(self._part, schema, compression="zstd")
        self._rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> ParquetSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        except BaseException:
            kind = RuntimeError
            raise
        finally:
            self._writer.close()
            _finish(self._part, self.path, kind is None)


Sink = JsonlSink | ParquetSink


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that it is never seen half written."""
    part = _part(path)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _finish(part, path, True)


def _part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.part")


def _finish(part: Path, path: Path, good: bool) -> None:
    if not good:
        part.unlink(missing_ok=True)
        return
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
