"""Tokenized rows for training: read, checked, and packed into sequences. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memento_sgl.errors import ConfigError, DataError
from memento_sgl.offline.masks import IGNORED, Ints, mask_fields, pack

Stage = Literal["full", "memento"]
COLUMNS = ("input_ids", "labels", "evictions", "block_spans", "memento_spans")


class TrainingRow(NamedTuple):
    """One row of a tokenized dataset; positions are indices into `input_ids`.

    Attributes:
        labels: `input_ids`, -100 where nothing is learned; not shifted.
        evictions: `[point, start, end]` each.
        block_spans, memento_spans: `[start, end)` each, without markers.
    """

    input_ids: list[int]
    labels: list[int]
    evictions: list[list[int]]
    block_spans: list[list[int]]
    memento_spans: list[list[int]]


class Packed(NamedTuple):
    """Rows put together for one forward pass of U tokens; int32 `[U]` each."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    hidden_from: Ints


def read_training_rows(paths: Sequence[Path]) -> list[TrainingRow]:
    """Rows of the `tokenized` outputs of `memento convert`: Parquet files or folders of them.

    Raises:
        ConfigError: nothing there.
        DataError: a file of another kind, or a row without blocks; says which.
    """
    rows = []
    for file in _files(paths):
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is no Parquet file: {error}") from None
        if missing := [name for name in COLUMNS if name not in table.column_names]:
            raise DataError(
                f"{file} has no column {', '.join(missing)}: train on the tokenized dataset that "
                "`memento convert --train-tokenizer MODEL` writes"
            )
        for number, values in enumerate(table.select(COLUMNS).to_pylist()):
            rows.append(_checked(TrainingRow(**values), f"{file}, row {number}"))
    if not rows:
        raise DataError("there is no row to train on")
    return rows


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        found = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise ConfigError(f"{path}: no such file, or a folder without Parquet files")
        yield from found


def _checked(row: TrainingRow, where: str) -> TrainingRow:
    if len(row.labels) != len(row.input_ids):
        raise DataError(f"{where}: {len(row.labels)} labels for {len(row.input_ids)} tokens")
    if not row.block_spans:
        raise DataError(f"{where}: no blocks; a row without blocks teaches no memento")
    if all(label == IGNORED for label in row.labels):
        raise DataError(f"{where}: nothing to learn, all labels are {IGNORED}")
    try:
        mask_fields(row.evictions, len(row.input_ids))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return row


def check_tokens(rows: Iterable[TrainingRow], vocabulary: int, markers: Sequence[int]) -> None:
    """Whether the rows were tokenized for this model.

    Args:
        vocabulary: rows of the model's embedding.
        markers: ids of block start and end, memento start and end, in this order.

    Raises:
        DataError: an id outside the vocabulary, or other tokens than the markers around a span.
    """
    start, end, summary_start, summary_end = markers
    for number, row in enumerate(rows):
        ids = row.input_ids
        if max(ids) >= vocabulary:
            raise DataError(
                f"row {number}: token id {max(ids)}, but the model has {vocabulary}: the data were "
                "tokenized for another model"
            )
        for spans, opens, closes in (
            (row.block_spans, start, end),
            (row.memento_spans, summary_start, summary_end),
        ):
            for low, high in spans:
                if (ids[low - 1], ids[high]) != (opens, closes):
                    raise DataError(
                        f"row {number}: tokens {ids[low - 1]} and {ids[high]} stand around a span, "
                        f"this tokenizer's markers are {opens} and {closes}: the data were "
                        "tokenized for another model"
                    )


def pack_rows(rows: Sequence[TrainingRow], stage: Stage, pack_tokens: int) -> list[Packed]:
    """Rows in their order, as many to a sequence as fit; none is cut.

    Args:
        stage: "full": causal attention; "memento": evicted blocks are hidden.
        pack_tokens: most tokens of a sequence.

    Raises:
        DataError: a row that is longer than that.
    """
    packs: list[Packed] = []
    waiting: list[TrainingRow] = []
    held = 0
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        if size > pack_tokens:
            raise DataError(
                f"row {number} has {size:,} tokens, a packed sequence {pack_tokens:,}: raise "
                "--pack-tokens, or drop long rows with `memento convert --max-row-tokens`"
            )
        if held + size > pack_tokens:
            packs.append(_packed(waiting, stage))
            waiting, held = [], 0
        waiting.append(row)
        held += size
    packs.append(_packed(waiting, stage))
    return packs


def _packed(rows: Sequence[TrainingRow], stage: Stage) -> Packed:
    fields = pack(
        [
            mask_fields(row.evictions if stage == "memento" else [], len(row.input_ids))
            for row in rows
        ]
    )
    labels = []
    for row in rows:
        labels += [IGNORED, *row.labels[1:]]  # nothing is predicted across documents
    ids = [token for row in rows for token in row.input_ids]
    return Packed(
        input_ids=np.array(ids, dtype=np.int32),
        labels=np.array(labels, dtype=np.int32),
        position_ids=fields.positions,
        hidden_from=fields.hidden_from,
    )
