"""Accounting beside an answer, where no client of OpenAI's types complains. Plain Python.

OpenAI's `metadata` maps strings to strings, so `metadata["memento"]` is JSON: a list of one record
for each choice.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

KEY = "memento"


def write_records(records: Sequence[Mapping[str, Any] | None]) -> str:
    """The value of `metadata["memento"]`."""
    return json.dumps(list(records), separators=(",", ":"))


def read_records(metadata: Mapping[str, Any] | None) -> list[dict[str, Any] | None] | None:
    """The accounting of each choice, from an answer's `metadata`; None if there is none.

    Servers before 0.2 sent the list itself.
    """
    value = (metadata or {}).get(KEY)
    records: list[dict[str, Any] | None] | None
    records = json.loads(value) if isinstance(value, str) else value
    return records


class Recorder:
    """A tokenizer manager that remembers the accounting of what it generates.

    Attributes:
        records: by choice.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.records: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for content in self._manager.generate_request(*args, **kwargs):
            for each in content if isinstance(content, list) else [content]:
                if (record := each["meta_info"].get(KEY)) is not None:
                    self.records[each.get("index", 0)] = record
            yield content
