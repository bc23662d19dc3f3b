"""Questions with answers, from JSONL or Parquet, by the column names of the usual benchmarks."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from memento_sgl.errors import ConfigError, DataError

Kind = Literal["math", "choice", "text"]
KINDS: tuple[str, ...] = get_args(Kind)
INSTRUCTIONS: dict[str, str] = {
    "math": "Put your final answer in \\boxed{}.",
    "choice": "Give the letter of your choice in \\boxed{}.",
    "text": "",
}
LETTERS = string.ascii_uppercase

# Lower-case column names, the first that a row has.
QUESTION = ("question", "problem", "prompt")
ANSWER = ("answer", "correct answer", "expected_answer", "target")
CHOICES = ("choices", "options")
IDS = ("id", "unique_id", "record id")
WRONG = "incorrect answer "  # GPQA: one column each


@dataclass(frozen=True, slots=True)
class EvalQuestion:
    """One question and what it should give.

    Attributes:
        text: as it is asked, options and instruction included.
        answer: what is right: an expression, a letter, or a text.
    """

    id: str
    text: str
    answer: str
    kind: Kind


def read_questions(
    path: Path, *, kind: str = "auto", seed: int = 0, instruction: str | None = None
) -> list[EvalQuestion]:
    """All questions of a file.

    Args:
        path: `.parquet`, else JSONL. Known columns: AIME (`Problem`, `Answer`), MATH-500
            (`problem`, `answer`, `unique_id`), GSM8K (`answer` ends in `#### 42`), GPQA
            (`Question`, `Correct Answer`, `Incorrect Answer 1` ...), and `question`, `choices`,
            `answer` (a letter, an index or the option).
        kind: how answers are compared; "auto": "choice" where a row has options, else "math".
        seed: of the order of options.
        instruction: put behind each question; None: what asks for the form that is read.

    Raises:
        ConfigError: the file cannot be read; an unknown kind.
        DataError: a row that is no question with an answer, or an id twice.
    """
    if kind not in (*KINDS, "auto"):
        raise ConfigError(f"kind {kind!r}: expected auto, {', '.join(KINDS)}")
    found: dict[str, EvalQuestion] = {}
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path}:{number}"
        question = _question(row, number, where, kind, seed, instruction)
        if question.id in found:
            raise DataError(f"{where}: the id {question.id!r} is there twice")
        found[question.id] = question
    if not found:
        raise DataError(f"{path} holds no question")
    return list(found.values())


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path)
            return
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not valid JSON: {error}") from None


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}") from None


def _question(
    row: Any, number: int, where: str, kind: str, seed: int, instruction: str | None
) -> EvalQuestion:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    columns = {str(name).lower(): value for name, value in row.items() if value is not None}
    text = _first(columns, QUESTION, where)
    answer = _first(columns, ANSWER, where)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the question is no text")
    known = [columns[name] for name in IDS if name in columns]
    id_ = str(known[0]) if known else str(number)
    options, right = _options(columns, answer, where)
    if options is None:
        if kind == "choice":
            raise DataError(f"{where}: kind choice, but the row has no options")
        settled: Kind = "text" if kind == "text" else "math"
        expected = _plain_answer(answer, where)
    else:
        if kind not in ("auto", "choice"):
            raise DataError(f"{where}: kind {kind}, but the row has options")
        settled = "choice"
        order = list(range(len(options)))
        random.Random(f"{seed}:{id_}").shuffle(order)
        expected = LETTERS[order.index(right)]
        shown = [f"{LETTERS[i]}) {options[j]}" for i, j in enumerate(order)]
        text = "\n".join([text.rstrip(), "", *shown])
    ask = INSTRUCTIONS[settled] if instruction is None else instruction
    return EvalQuestion(id_, f"{text.rstrip()}\n\n{ask}" if ask else text, expected, settled)


def _first(columns: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in columns:
            return columns[name]
    raise DataError(f"{where}: no column of {', '.join(names)} (there are: {', '.join(columns)})")


def _plain_answer(answer: Any, where: str) -> str:
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise DataError(f"{where}: the answer is {type(answer).__name__}, not text or a number")
    text = str(answer).rpartition("####")[2].strip()  # GSM8K
    if not text:
        raise DataError(f"{where}: the answer is empty")
    return text


def _options(columns: Mapping[str, Any], answer: Any, where: str) -> tuple[list[str] | None, int]:
    """The options of a row and the index of the right one."""
    wrong = [columns[name] for name in sorted(columns) if name.startswith(WRONG)]
    if wrong:
        return [str(answer).strip(), *(str(option).strip() for option in wrong)], 0
    given = next((columns[name] for name in CHOICES if name in columns), None)
    if given is None:
        return None, 0
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise DataError(f"{where}: the options are no list of 2 to {len(LETTERS)}")
    options = [str(option).strip() for option in given]
    index = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if isinstance(answer, str):
        letter = answer.strip().upper()
        is_letter = len(letter) == 1 and letter in LETTERS and letter not in options
        index = LETTERS.index(letter) if is_letter else _index_of(answer.strip(), options)
    if not 0 <= index < len(options):
        raise DataError(f"{where}: the answer {answer!r} is none of the {len(options)} options")
    return options, index


def _index_of(answer: str, options: Sequence[str]) -> int:
    return options.index(answer) if answer in options else -1
