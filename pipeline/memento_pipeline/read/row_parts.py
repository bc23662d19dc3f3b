"""Where in a row problem, thought and answer stand: columns, chat turns or generations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from memento_pipeline.read.columns import (
    RESPONSES,
    THOUGHTS,
    Cells,
    given,
    missing,
)
from memento_pipeline.read.said import RowError, Said, join, take_apart
from memento_pipeline.read.turns import read_answer, read_chat, thought_text
from memento_pipeline.text.escape import unescape

Choose = Literal["first", "all", "verified"]
"""Of several generations: the first, all, or the first that the row calls right."""

_PLAIN = ("cot", "full_cot")  # text and nothing else


class Text(NamedTuple):
    """The parts of one trace; `number` counts the generations of a row of which all are taken."""

    shape: str
    problem: str
    said: Said
    notes: Mapping[str, Any] = {}
    number: int | None = None


def texts_of(cells: Cells, choose: Choose | None) -> Iterable[Text]:
    """The traces in a row; several only with `choose="all"`.

    Raises:
        RowError: none, or one that cannot be read without guessing.
    """
    for name in cells.present("media"):
        if cells.row[name]:
            raise RowError(f"the row has {name}: only text can be trained on")
    asked, system = _problem(cells)
    turns = cells.first("turns")
    several = _several(cells)
    if several and asked is not None and (choose or turns is None):
        return _generations(cells, several, choose, asked, system)
    if turns is not None and not _in_columns(cells, asked):
        apart = [text for _, text in _thoughts(cells)][:1]
        chat = read_chat(turns, given=apart)
        assert chat.said is not None
        said = _answered(cells, chat.said)
        return (_text("turns", chat.problem, said, [*system, *chat.system]),)
    if asked is None:
        raise missing(cells.row)
    return (_text("columns", asked, _from_columns(cells), system),)


def _text(
    shape: str, problem: str, said: Said, system: Sequence[str], number: int | None = None
) -> Text:
    if said.mementos and shape == "columns":
        shape, problem = "openmementos", unescape(problem)
    notes = {"system": "\n\n".join(system)} if system else {}
    return Text(shape, problem, said, notes, number)


def _problem(cells: Cells) -> tuple[str | None, list[str]]:
    """The problem and the system messages; a prompt may be in chat form, an instruction may come
    with an input."""
    texts = (cells.row[name] for name in cells.present("system"))
    system = [text for text in texts if isinstance(text, str) and text.strip()]
    column, value = next(cells.of("problem"), (None, None))
    if isinstance(value, list):
        chat = read_chat(value, answered=False)
        return chat.problem, [*system, *chat.system]
    if value is not None and not isinstance(value, str):
        raise RowError(f"{column} must be text: name another with --column problem=NAME")
    more = cells.row.get("input") if column == "instruction" else None
    if isinstance(more, str) and more.strip():
        value = f"{value}\n\n{more}"
    return value, system


def _in_columns(cells: Cells, asked: str | None) -> bool:
    """Whether a row that has turns is read from its columns all the same."""
    if "thought" in cells.names:
        return True
    return asked is not None and any(
        isinstance(cells.row.get(name), str) for name in (*_PLAIN, "response")
    )


def _thoughts(cells: Cells) -> Iterator[tuple[str, str]]:
    """Columns that hold a thought and nothing else, with their texts."""
    named = "thought" in cells.names
    for name in (cells.names["thought"],) if named else cells.present("thoughts"):
        if named and name not in cells.row:
            raise RowError(f"no column {name!r} for the thought: see --column")
        value = cells.row[name]
        if not given(value):
            continue
        if not isinstance(value, str) and (name in _PLAIN or named):
            raise RowError(f"{name} must be text: name another with --column thought=NAME")
        if isinstance(value, list) and len(value) > 1 and isinstance(value[0], str):
            raise RowError(f"{len(value)} thoughts in {name}")
        text = value if named else thought_text(name, value)
        if text is not None and ((text and not text.isspace()) or name in _PLAIN):
            yield name, text


def _from_columns(cells: Cells) -> Said:
    found = list(_thoughts(cells))
    if found:
        first = next((pair for pair in found if pair[1] and not pair[1].isspace()), found[0])
        return _answered(cells, _with_response(cells, *first))
    for name in cells.present("responses"):
        if given(cells.row[name]):
            return _answered(cells, _response(name, cells.row[name]))
    for _, value in cells.of("answer"):
        if isinstance(value, str) and (said := take_apart(value)).marked:
            return said
    raise missing(cells.row)


def _with_response(cells: Cells, column: str, thought: str) -> Said:
    """A thought with the answer that stands in a column of its own."""
    said = take_apart(thought, bare=True)
    if said.answer.strip() or "answer" in cells.names:
        return said
    for name in (*THOUGHTS.get(column, ()), *RESPONSES):
        value = cells.row.get(name)
        if name != column and given(value) and value != "":
            return _response(name, value, [thought])
    return said


def _response(name: str, value: Any, thoughts: Sequence[str] = ()) -> Said:
    """A text, a turn, or a list with one turn."""
    if isinstance(value, str):
        return join(thoughts, value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return join(thoughts, value[0])
    if isinstance(value, dict | list):
        return read_answer(value, thoughts)
    raise RowError(f"{name} must be text: name another with --column thought=NAME")


def _answered(cells: Cells, said: Said) -> Said:
    """`said` with the answer of a column, where nothing follows the thought."""
    if said.answer.strip():
        return said
    for name, value in cells.of("answer"):
        if (text := _as_text(name, value)).strip():
            return said._replace(answer=text)
    return said


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    finite = (isinstance(value, float) and math.isfinite(value)) or (
        isinstance(value, Decimal) and value.is_finite()
    )
    if finite or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise RowError(f"{name} must be text or a number, not {type(value).__name__}")


def _several(cells: Cells) -> list[Any] | None:
    for _, value in cells.of("generations"):
        if isinstance(value, list) and value and all(isinstance(v, str | dict) for v in value):
            return value
    return None


def _generations(
    cells: Cells, several: list[Any], choose: Choose | None, asked: str, system: Sequence[str]
) -> Iterator[Text]:
    verdicts = (cells.row[name] for name in cells.present("verdicts"))
    flags = [v for v in verdicts if isinstance(v, list) and len(v) == len(several)]
    right = [n for n in range(len(several)) if any(verdict[n] for verdict in flags)]
    if choose in (None, "verified") and (flags or choose):
        if not flags:
            raise RowError("nothing says which generation is right: see --generations")
        if not right:
            raise RowError(f"none of {len(several)} generations is right: see --generations")
        chosen = right[:1]
    else:
        chosen = list(range(len(several))) if choose == "all" else [0]
    failed: RowError | None = None
    for n in chosen:
        try:
            said = _response("generations", several[n])
        except RowError as error:
            failed = failed or RowError(f"generation {n + 1}: {error}")
            continue
        text = _text("generations", asked, said, system, n + 1 if choose == "all" else None)
        yield text._replace(notes={**text.notes, "generation": n + 1})
    if failed is not None:
        raise failed
