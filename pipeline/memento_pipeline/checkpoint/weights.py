"""Rows of matrices in safetensors files, read and written without loading the files.

    file    [ 8 bytes: length N | N bytes: JSON header | data ]
    header  {"name": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [start, end]}, ...}

A matrix is stored row by row, so rows can be replaced and appended while the rest is copied as a
stream: memory is that of the rows and one buffer, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from memento_sgl.errors import DataError

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Kinds of numbers that can be averaged; the names are those of torch."""

_BUFFER = 16 * 1024 * 1024
_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000


class Matrix(NamedTuple):
    """A tensor of floats whose first axis is the vocabulary."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of one number where the tensor has one axis."""
        width = 1
        for size in self.shape[1:]:
            width *= size
        return width * {"F64": 8, "F32": 4}.get(self.dtype, 2)


class Header(NamedTuple):
    """The tensors of one file. `start`: where its data begins."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str] | None
    start: int


def read_header(file: Path) -> Header:
    """Names, shapes and places of the tensors of a safetensors file.

    Raises:
        DataError: not a whole safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as data:
        first = data.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LONGEST_HEADER
        if length >= min(size, _LONGEST_HEADER):
            raise DataError(f"{file} is not a safetensors file, or it is cut off")
        try:
            tensors = json.loads(data.read(length))
        except ValueError:
            raise DataError(f"{file} is not a safetensors file: its header is no JSON") from None
    metadata = tensors.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if 8 + length + end != size:
        raise DataError(f"{file} is cut off: {8 + length + end} bytes expected, {size} found")
    return Header(tensors, metadata, 8 + length)


def matrix(file: Path, header: Header, name: str) -> Matrix:
    """Where the rows of a tensor are.

    Raises:
        DataError: its numbers are not plain floats.
    """
    tensor = header.tensors[name]
    if tensor["dtype"] not in FLOATS:
        raise DataError(
            f"{name} is stored as {tensor['dtype']}: start from a checkpoint whose embeddings are "
            f"not quantised ({', '.join(FLOATS)})"
        )
    start = header.start + tensor["data_offsets"][0]
    return Matrix(file, name, tensor["dtype"], tuple(tensor["shape"]), start)


def read_row(place: Matrix, row: int) -> bytes:
    """The bytes of one row."""
    with place.file.open("rb") as data:
        data.seek(place.start + row * place.row_bytes)
        return data.read(place.row_bytes)


def rewrite(
    source: Path,
    target: Path,
    changes: Mapping[str, Mapping[int, bytes]],
) -> None:
    """Copy a safetensors file with some rows replaced or appended.

    Args:
        changes: tensor name to row number to the row's bytes. Row numbers at or beyond the end
            lengthen the tensor and must leave no gap.

    Raises:
        DataError: not a safetensors file.
    """
    header = read_header(source)
    order = sorted(header.tensors, key=lambda name: header.tensors[name]["data_offsets"])
    layout: dict[str, Any] = {}
    if header.metadata is not None:
        layout["__metadata__"] = header.metadata
    position = 0
    for name in order:
        tensor = header.tensors[name]
        shape, (start, end) = list(tensor["shape"]), tensor["data_offsets"]
        added = [row for row in changes.get(name, {}) if row >= shape[0]]
        assert sorted(added) == list(range(shape[0], shape[0] + len(added)))
        size = end - start + sum(len(changes[name][row]) for row in added)
        if added:
            shape[0] += len(added)
        offsets = [position, position + size]
        layout[name] = {"dtype": tensor["dtype"], "shape": shape, "data_offsets": offsets}
        position += size
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with source.open("rb") as data, target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name in order:
            _copy_tensor(data, out, header, name, changes.get(name, {}))


def _copy_tensor(
    data: BinaryIO, out: BinaryIO, header: Header, name: str, rows: Mapping[int, bytes]
) -> None:
    start, end = (header.start + offset for offset in header.tensors[name]["data_offsets"])
    data.seek(start)
    for row in sorted(rows):
        place = start + row * len(rows[row])
        _copy(data, out, min(place, end) - data.tell())
        out.write(rows[row])
        data.seek(min(place + len(rows[row]), end))
    _copy(data, out, end - data.tell())


def _copy(data: BinaryIO, out: BinaryIO, count: int) -> None:
    while count > 0:
        piece = data.read(min(count, _BUFFER))
        if not piece:
            raise DataError(f"{data.name} ended while it was copied")
        out.write(piece)
        count -= len(piece)
