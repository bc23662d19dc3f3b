"""The columns of public data sets, and what each of them tells about a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from memento_pipeline.read.said import RowError
from memento_pipeline.read.turns import THOUGHT_KEYS
from memento_sgl.offline.inputs.rows import Unreadable

THOUGHTS: dict[str, tuple[str, ...]] = {
    "cot": (),
    "full_cot": (),
    **dict.fromkeys(THOUGHT_KEYS, ()),
    "deepseek_reasoning": ("deepseek_solution",),  # OpenThoughts, metadata
    "deepseek_thinking_trajectory": ("deepseek_attempt",),  # s1K-1.1
    "gemini_thinking_trajectory": ("gemini_attempt",),
    "thinking_trajectories": ("attempt",),  # s1K
}
"""Columns that hold a thought, tags or not, and where each has its own answer."""

RESPONSES = ("response", "completion", "generated_solution", "output", "generation")
"""Columns that hold thought and answer in one text or turn, or the answer to a thought above."""

ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", "task_id", "uuid", "_id"),
    "problem": ("problem", "prompt", "question", "instruction", "query", "input"),
    "thought": (*THOUGHTS, *RESPONSES),
    "answer": ("answer", "solution", "final_answer", "expected_answer"),
    "turns": ("conversations", "messages"),
    "generations": ("generations", "responses", "completions"),
    "source": ("source", "problem_source", "source_type"),
    "domain": ("domain", "category", "cot_type"),
    "difficulty": ("difficulty",),
}
"""What a row can tell, and the columns it is looked for in; the first that is there counts."""

VERDICTS = (
    "correctness_math_verify",
    "correctness_llama",
    "correctness",
    "is_correct",
    "correct",
    "verified",
    "is_verified",
)
"""Columns with one flag per generation; one of them is enough."""

SYSTEM = ("system", "system_prompt")
MEDIA = ("image", "images", "audio", "video", "videos")
_LIMO = {"question", "solution", "answer"}

Row = Mapping[str, Any]
Names = Mapping[str, str]
"""Role to the column that the user named for it."""


def readable(row: Row, names: Names) -> tuple[Row, list[str]]:
    """The row without the cells that cannot be read, and the names of these.

    Raises:
        RowError: one of them is a column that counts.
    """
    if Unreadable not in map(type, row.values()):
        return row, []
    bad = {name: cell for name, cell in row.items() if isinstance(cell, Unreadable)}
    wanted = {name for columns in ROLES.values() for name in columns} | set(names.values())
    for name, cell in bad.items():
        if name in wanted:
            raise RowError(f"column {name!r} cannot be read: {cell.reason}")
    return {name: cell for name, cell in row.items() if name not in bad}, sorted(map(str, bad))


_EVERY = {**ROLES, "thoughts": tuple(THOUGHTS), "responses": RESPONSES, "system": SYSTEM}
_EVERY |= {"verdicts": VERDICTS, "media": MEDIA}


@lru_cache(maxsize=1024)
def _present(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Of each list of columns those that are there: the rows of a file mostly have the same."""
    there = set(names)
    return {kind: tuple(n for n in known if n in there) for kind, known in _EVERY.items()}


def given(value: Any) -> bool:
    """Whether a cell holds something; pandas writes what is missing as NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


class Cells:
    """The cells of a row by what they tell. The known columns are looked up once for a row."""

    __slots__ = ("_there", "names", "row")

    def __init__(self, row: Row, names: Names) -> None:
        self.row, self.names = row, _limo(row, names)
        self._there = _present(tuple(row))

    def present(self, kind: str) -> tuple[str, ...]:
        """The columns of the row that are in a list: of a role, `thoughts`, `responses`,
        `system`, `verdicts` or `media`."""
        return self._there[kind]

    def of(self, role: str) -> Iterator[tuple[str, Any]]:
        """The columns of a role that hold something, in order.

        Raises:
            RowError: the column that the user named is not there.
        """
        if role in self.names:
            name = self.names[role]
            if name not in self.row:
                raise RowError(f"no column {name!r} for the {role}: see --column")
            if given(self.row[name]):
                yield name, self.row[name]
            return
        for name in self._there[role]:
            if given(value := self.row[name]):
                yield name, value

    def first(self, role: str) -> Any:
        """The first value of a role, None where there is none.

        Raises:
            RowError: as `of`.
        """
        if role in self.names:
            return next((value for _, value in self.of(role)), None)
        for name in self._there[role]:
            if given(value := self.row[name]):
                return value
        return None


def _limo(row: Row, names: Names) -> Names:
    """The roles of a LIMO row, whose solution is the thought. Other data sets have a reference
    solution in that column, so all columns must be LIMO's."""
    if not names and _LIMO <= row.keys() <= _LIMO | {"id"}:
        return {"thought": "solution", "answer": "answer"}
    return names


def missing(row: Row) -> RowError:
    return RowError(
        f"no known columns among {sorted(map(str, row))}: needed are a problem "
        f"({', '.join(ROLES['problem'])}) with a thought ({', '.join(ROLES['thought'])}), or "
        f"{' or '.join(ROLES['turns'])}; name others with --column problem=NAME --column "
        "thought=NAME"
    )
