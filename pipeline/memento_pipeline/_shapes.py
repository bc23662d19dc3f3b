"""The shapes of input rows and what each says about problem, thought and answer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from memento_pipeline._pairs import outside, pairs
from memento_pipeline.escape import unescape
from memento_pipeline.records import Span, Trace
from memento_pipeline.split import is_boundary

ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", "task_id", "uuid", "_id"),
    "problem": ("problem", "prompt", "question"),
    "thought": ("cot", "full_cot", "response"),
    "answer": ("answer", "solution"),
    "turns": ("conversations", "messages"),
    "source": ("source",),
    "domain": ("domain",),
    "difficulty": ("difficulty",),
}
"""What a row can tell, and the columns it is looked for in; the first that is there counts."""

_BARE_THOUGHT = ("cot", "full_cot")  # columns that hold a thought even without tags
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")


class RowError(Exception):
    """A row that is no trace; the message is its reason."""

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


class Text(NamedTuple):
    """The parts of one row."""

    problem: str
    thought: str
    answer: str
    closed: bool
    blocks: tuple[Span, ...] = ()
    mementos: tuple[str, ...] = ()
    notes: Mapping[str, Any] = {}


def to_trace(
    row: Mapping[str, Any], columns: Mapping[str, str], place: Mapping[str, Any]
) -> tuple[Trace, str]:
    """The trace of a row and the hash of its content.

    Raises:
        RowError: no known shape, a wrong type, or text that is not valid Unicode.
    """
    shape, text = _text(row, columns)
    for part in (text.problem, text.thought, text.answer):
        if not part.isascii() and _has_surrogates(part):
            raise RowError("the text holds lone surrogates: it is not valid Unicode")
    content = hashlib.sha256(
        "\0".join((text.problem, text.thought, text.answer)).encode()
    ).hexdigest()
    given = _cell(row, columns, "id")
    try:
        trace = Trace(
            id=str(given) if given not in (None, "") else content[:16],
            problem=text.problem,
            thought=text.thought,
            answer=text.answer,
            source=_optional_text(row, columns, "source"),
            domain=_optional_text(row, columns, "domain"),
            difficulty=_whole(_cell(row, columns, "difficulty")),
            closed=text.closed,
            given_blocks=text.blocks,
            given_mementos=text.mementos,
            provenance={**place, "shape": shape, **text.notes},
        )
    except ValidationError as error:
        raise RowError(f"not a usable row: {error.errors()[0]['msg']}") from None
    return trace, content


def _text(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, Text]:
    turns = _cell(row, columns, "turns")
    if turns is not None and _column(row, columns, "thought") is None:
        return "turns", _from_turns(turns)
    problem = _cell(row, columns, "problem")
    if isinstance(problem, list):  # a prompt in chat form
        problem = _single_user(_roles(problem))
    column = _column(row, columns, "thought")
    if problem is None or column is None:
        raise RowError(
            f"no known columns among {sorted(map(str, row))}: needed are a problem "
            f"({', '.join(ROLES['problem'])}) with a thought ({', '.join(ROLES['thought'])}), or "
            f"{' or '.join(ROLES['turns'])}"
        )
    thought = row[column]
    if not isinstance(problem, str) or not isinstance(thought, str):
        raise RowError(f"problem and {column} must be text")
    if any(pairs(thought)):
        return "openmementos", _from_blocks(problem, thought)
    bare = column in _BARE_THOUGHT or column == columns.get("thought")
    text = _from_tags(problem, thought, bare=bare)
    answer = _cell(row, columns, "answer")
    if not text.answer.strip() and isinstance(answer, str):
        text = text._replace(answer=answer)
    return "columns", text


def _from_tags(problem: str, text: str, *, bare: bool) -> Text:
    """Split at `</think>`; `<think>` may be missing, since it is often part of the prompt."""
    notes: dict[str, Any] = {}
    before, opened, rest = text.partition("<think>")
    if not opened or "</think>" in before:
        before, opened, rest = "", "", text
    if before.strip():
        notes["before_think"] = before
    thought, closing, answer = rest.partition("</think>")
    if not opened and not closing and not bare:
        return Text(problem, "", text, closed=False, notes=notes)
    return Text(problem, thought, answer, closed=bool(closing) or not opened, notes=notes)


def _from_turns(turns: Any) -> Text:
    roles = _roles(turns)
    problem = _single_user(roles)
    spoken = [turn for role, turn in roles if role in _ASSISTANT]
    if len(spoken) != 1:
        raise RowError(f"{len(spoken)} assistant turns: exactly one is expected")
    answer = _content(spoken[0])
    if isinstance(reasoning := spoken[0].get("reasoning_content"), str) and reasoning:
        text = Text(problem, reasoning, answer, closed=True)
    elif any(pairs(answer)):
        text = _from_blocks(problem, answer)
    else:
        text = _from_tags(problem, answer, bare=False)
    system = [_content(turn) for role, turn in roles if role == "system"]
    return text._replace(notes={**text.notes, "system": system[0]}) if system else text


def _roles(turns: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("turns must be a list of objects")
    return [(str(turn.get("role") or turn.get("from") or "").lower(), turn) for turn in turns]


def _single_user(roles: list[tuple[str, Mapping[str, Any]]]) -> str:
    asked = [_content(turn) for role, turn in roles if role in _USER]
    if len(asked) != 1:
        raise RowError(f"{len(asked)} user turns: exactly one is expected")
    return asked[0]


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # content parts
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise RowError("a turn has no text")
    return content


def _from_blocks(problem: str, text: str) -> Text:
    """An OpenMementos response: the blocks joined are the thought. Text with markers but without
    a single complete pair is no such row: there the markers are words, and are escaped.

    Rows of other writers have lost the white space between blocks; where two sentences would be
    glued together, a newline stands in and is counted in the notes.
    """
    _, opened, rest = text.partition("<think>")
    body, closing, answer = (rest if opened else text).partition("</think>")
    thought = ""
    spans: list[Span] = []
    mementos: list[str] = []
    lost = 0
    for pair in pairs(body):
        block = unescape(pair.block)
        if not is_boundary(thought, block) and not block[:1].isspace():
            thought, lost = thought + "\n", lost + 1
            spans[-1] = Span(spans[-1].start, len(thought))
        spans.append(Span(len(thought), len(thought) + len(block)))
        thought += block
        mementos.append(unescape(pair.memento).strip("\n"))
    if outside(body).strip():
        raise RowError("an OpenMementos row with text outside its blocks and mementos")
    notes = {"separators_lost": lost} if lost else {}
    return Text(
        unescape(problem),
        thought,
        unescape(answer),
        closed=bool(closing),
        blocks=tuple(spans),
        mementos=tuple(mementos),
        notes=notes,
    )


def _column(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> str | None:
    if role in columns:
        if columns[role] not in row:
            raise RowError(f"no column {columns[role]!r} for the {role}")
        return columns[role]
    return next((name for name in ROLES[role] if row.get(name) is not None), None)


def _cell(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> Any:
    column = _column(row, columns, role)
    return None if column is None else row[column]


def _optional_text(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> str | None:
    value = _cell(row, columns, role)
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise RowError(f"difficulty must be a whole number, not {value!r}")
    return int(value)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
