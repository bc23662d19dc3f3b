"""Structured logs: one JSON object a line, in the work folder."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

FILE_NAME = "log.jsonl"
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """Time (UTC), level, module, message and whatever was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z",
            "level": record.levelname.lower(),
            "module": record.name.removeprefix("memento_pipeline."),
            "message": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class LogFile:
    """Appends the pipeline's log records to `FOLDER/log.jsonl` while it is open."""

    def __init__(self, folder: Path) -> None:
        self._handler = logging.FileHandler(folder / FILE_NAME, encoding="utf-8")
        self._handler.setFormatter(JsonLines())
        self._logger = logging.getLogger("memento_pipeline")
        self._before = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> None:
        self._logger.addHandler(self._handler)
        # The progress display owns the terminal; warnings about single tries belong in the file.
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.level, self._logger.propagate = self._before
        self._handler.close()
