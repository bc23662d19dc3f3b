"""A row of any known shape as traces: their ids, their texts, and what had to be noted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from memento_pipeline.read.columns import Cells, Names, Row, readable
from memento_pipeline.read.row_parts import Choose, Text, texts_of
from memento_pipeline.read.said import RowError
from memento_pipeline.records import Trace

_LARGEST = 2**63 - 1  # what the output's int64 columns hold


def to_traces(
    row: Row, names: Names, place: Mapping[str, Any], choose: Choose | None = None
) -> Iterator[tuple[Trace, str]]:
    """The traces of a row, each with the hash of its content. Several only with `choose="all"`.

    Args:
        names: column names where they differ from the known ones, by role.

    Raises:
        RowError: no known shape, a wrong type, or text that is not valid Unicode.
    """
    row, unreadable = readable(row, names)
    cells = Cells(row, names)
    notes: dict[str, Any] = {"unreadable": unreadable} if unreadable else {}
    if tools := row.get("tools"):
        notes["tools"] = len(tools) if isinstance(tools, list) else 1
    for text in texts_of(cells, choose):
        yield _trace(cells, text, {**place, "shape": text.shape, **notes})


def _trace(cells: Cells, text: Text, provenance: dict[str, Any]) -> tuple[Trace, str]:
    said = text.said
    content = hashlib.sha256(
        _encoded("\0".join((text.problem, said.thought, said.answer)))
    ).hexdigest()
    for name, note in (*said.notes.items(), *text.notes.items()):
        provenance[name] = _valid(note) if isinstance(note, str) else note
    if not said.answer.strip():
        provenance["no_answer"] = True
    given = cells.first("id")
    name = content[:16] if given in (None, "") else _valid(str(given))
    if text.number is not None:
        provenance["generation"] = text.number
        name = name if given in (None, "") else f"{name}#{text.number}"
    try:
        trace = Trace(
            id=name,
            problem=text.problem,
            thought=said.thought,
            answer=said.answer,
            source=_optional_text(cells, "source"),
            domain=_optional_text(cells, "domain"),
            difficulty=_difficulty(cells.first("difficulty"), provenance),
            closed=said.closed,
            given_blocks=said.blocks,
            given_mementos=said.mementos,
            provenance=provenance,
        )
    except ValidationError as error:
        raise RowError(f"not a usable row: {error.errors()[0]['msg']}") from None
    return trace, content


def _difficulty(value: Any, notes: dict[str, Any]) -> int | None:
    """A whole number, or null and a note: no trace is lost over it."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    notes["difficulty"] = f"{str(value)[:80]!r} is no whole number of 64 bits"
    return None


def _optional_text(cells: Cells, role: str) -> str | None:
    value = cells.first(role)
    return None if value is None else _valid(str(value))


def _valid(text: str) -> str:
    if not text.isascii():
        _encoded(text)
    return text


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RowError("the text holds lone surrogates: it is not valid Unicode") from None
