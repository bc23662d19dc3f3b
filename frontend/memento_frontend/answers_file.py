"""The files of `run_batch`: questions in, one JSON line for each answer out."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from memento_frontend.native import Prompt
from memento_frontend.votes import Vote
from memento_sgl.errors import ConfigError, DataError, StoreError


@dataclass(frozen=True, slots=True)
class Item:
    """One question; `row` is what was given."""

    id: str
    question: Prompt
    row: dict[str, Any]


def read_items(questions: Path | str | Iterable[str | Mapping[str, Any]]) -> list[Item]:
    """Questions of a JSONL file, or given as texts or rows.

    Raises:
        ConfigError: the file cannot be read.
        DataError: a row that is no question, or an id twice.
    """
    where = "question"
    if isinstance(questions, (Path, str)):
        where = f"{questions}:"
        questions = _lines(Path(questions))
    items: dict[str, Item] = {}
    for number, row in enumerate(questions, start=1):
        item = _item(row, number, f"{where}{number}")
        if item.id in items:
            raise DataError(f"{where}{number}: the id {item.id!r} is there twice")
        items[item.id] = item
    return list(items.values())


def _lines(path: Path) -> list[Any]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number} is not valid JSON: {error}") from None
    return rows


def _item(row: Any, number: int, where: str) -> Item:
    if isinstance(row, str):
        row = {"question": row}
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a text or an object, got {type(row).__name__}")
    row = json.loads(json.dumps(dict(row)))  # as it will be read back
    question, messages = row.get("question"), row.get("messages")
    if isinstance(question, str) and messages is None:
        return Item(str(row.get("id", number)), question, row)
    if question is None and isinstance(messages, list) and messages:
        return Item(str(row.get("id", number)), messages, row)
    raise DataError(f"{where}: needs either `question`, a text, or `messages`, a list")


class AnswersFile:
    """Results that can be added to from several threads; one process at a time.

    The settings file beside it is its lock, and says how the results were made.

    Raises:
        StoreError: in use, damaged, or made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.answered = 0
        self.failed = 0
        self._path = path
        self._mutex = threading.Lock()
        self._settings = path.with_name(f"{path.name}.settings.json")
        try:
            self._lock = self._settings.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._settings} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StoreError(f"{path} is in use by another process: wait or stop it") from None
        try:
            self._records = self._read()
            self._check(json.loads(json.dumps(settings)))
            self._out = path.open("ab")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out.close()
        self._lock.close()

    def keep(self, items: Sequence[Item], *, retry_failed: bool) -> set[str]:
        """Settle which results stay; returns their ids.

        Raises:
            StoreError: a result answers another question than the one that has its id now.
        """
        rows = {item.id: item.row for item in items}
        for record in self._records:
            if rows.get(record["id"], record["input"]) != record["input"]:
                raise StoreError(
                    f"{self._path} answers another question {record['id']!r}: the questions have "
                    "changed; give another output file"
                )
        again = {
            number
            for number, record in enumerate(self._records)
            if retry_failed and record["error"] is not None
        }
        if again:
            self._drop(again)
        kept = [record for number, record in enumerate(self._records) if number not in again]
        asked = [record for record in kept if record["id"] in rows]
        self.failed = sum(record["error"] is not None for record in asked)
        self.answered = len(asked) - self.failed
        return {record["id"] for record in asked}

    def add(self, item: Item, *, vote: Vote | None = None, error: str | None = None) -> None:
        """Append one result, complete on disk when this returns."""
        record = {
            "id": item.id,
            "answer": vote and vote.answer,
            "votes": vote and vote.votes,
            "error": error,
            "attempts": [asdict(attempt) for attempt in vote.attempts] if vote else [],
            "input": item.row,
        }
        line = _line(record)
        with self._mutex:
            self._out.write(line)
            self._out.flush()
            if error is None:
                self.answered += 1
            else:
                self.failed += 1

    def _read(self) -> list[dict[str, Any]]:
        """What each result is about; a line that a killed process left unfinished is cut off."""
        if not self._path.exists():
            return []
        records = []
        whole = 0
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    record = json.loads(line)
                    records.append({name: record[name] for name in ("id", "input", "error")})
                except (ValueError, KeyError, TypeError):
                    raise StoreError(
                        f"{self._path}:{number} is no result of a batch: give another output file"
                    ) from None
        os.truncate(self._path, whole)
        return records

    def _check(self, settings: dict[str, Any]) -> None:
        self._lock.seek(0)
        text = self._lock.read()
        if not self._records:
            self._lock.truncate(0)
            self._lock.write(json.dumps(settings, indent=2) + "\n")
            self._lock.flush()
            return
        if not text:
            raise StoreError(f"{self._settings} is missing: give another output file")
        before = json.loads(text)
        if changed := _differences(before, settings):
            raise StoreError(
                f"{self._path} was made with other settings ({'; '.join(changed)}): give those, or "
                "another output file"
            )

    def _drop(self, numbers: set[int]) -> None:
        """Leave these lines out, counted from 0."""
        fresh = self._path.with_name(f"{self._path.name}.new")
        with self._path.open("rb") as lines, fresh.open("wb") as sink:
            sink.writelines(line for number, line in enumerate(lines) if number not in numbers)
            sink.flush()
            os.fsync(sink.fileno())
        self._out.close()
        fresh.replace(self._path)
        self._out = self._path.open("ab")


def _line(record: Mapping[str, Any]) -> bytes:
    # A lone surrogate is written as its JSON escape.
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What changed, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            part
            for key in keys
            for part in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name}: {before!r} then, {now!r} now"]
