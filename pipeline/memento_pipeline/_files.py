"""Rows of files as dictionaries: one row or batch in memory at a time."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from memento_pipeline._shapes import RowError
from memento_sgl.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet", ".arrow")
_BATCH = 64

Rows = Iterator[tuple[int, Mapping[str, Any] | RowError]]


def list_files(paths: Sequence[Path]) -> list[Path]:
    """The data files that `paths` name or hold.

    Raises:
        ConfigError: a path is missing, of an unknown kind, or a folder without data files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_data(file.relative_to(path)))
            found = [file for file in found if file.is_file()]
            if not found:
                raise ConfigError(f"{path} holds no {', '.join(SUFFIXES)} file")
            files += found
        elif not path.is_file():
            raise ConfigError(f"no such file or folder: {path}")
        elif not path.name.endswith(SUFFIXES):
            raise ConfigError(f"{path}: not one of the known kinds {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def _is_data(file: Path) -> bool:
    if any(part.startswith((".", "cache-")) for part in file.parts):
        return False
    return file.name.endswith(SUFFIXES) and file.suffix != ".json"  # metadata of dataset folders


def read_rows(file: Path) -> Rows:
    """Rows of one file, numbered from 1 (lines in JSONL).

    Raises:
        DataError: a Parquet or Arrow file that cannot be read.
    """
    if file.suffix in (".parquet", ".arrow"):
        return _table_rows(file)
    return _json_rows(file)


def count_file_rows(file: Path) -> int | None:
    """Rows of a file without parsing them; None for compressed text.

    Raises:
        DataError: a Parquet or Arrow file that cannot be read.
    """
    if file.suffix == ".gz":
        return None
    try:
        if file.suffix == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        if file.suffix == ".arrow":
            return sum(int(batch.num_rows) for batch in _arrow_batches(file))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _json_rows(file: Path) -> Rows:
    number = 0
    with _open(file) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if number == 1 and file.suffix == ".json" and line.lstrip().startswith(b"["):
                    raise DataError(f"{file} is one JSON array: write one row per line instead")
                yield number, _parse(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number + 1, RowError(f"the compressed file is cut off or damaged: {error}")


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _parse(line: bytes) -> Mapping[str, Any] | RowError:
    excerpt = line[:400].decode("utf-8", "backslashreplace")
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return RowError("not UTF-8", excerpt)
    except (json.JSONDecodeError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else "; the line is torn off"
        return RowError(f"not valid JSON: {error}{torn}", excerpt)
    if not isinstance(row, dict):
        return RowError(f"expected an object, got {type(row).__name__}", excerpt)
    return row


def _table_rows(file: Path) -> Rows:
    number = 0
    try:
        batches = _arrow_batches(file) if file.suffix == ".arrow" else _parquet_batches(file)
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read after row {number}: {error}") from None


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
