"""Trace files: written by a thread of their own, a bounded number, never in the way of serving."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Literal
from uuid import uuid4

from memento_sgl.errors import ConfigError
from memento_sgl.observe.trace.build import Finished, build_trace

logger = logging.getLogger(__name__)

WAITING = 256
"""Finished requests that wait for the thread; more of them are lost."""
COMPLAINTS_EVERY = 60.0
"""Seconds between two log lines about lost traces."""

Outcome = Literal["written", "lost"]


class TraceWriter:
    """Writes the traces of one data-parallel rank.

    Files appear whole, under names that no request id can choose. When there are more than `most`
    of this rank (those of earlier servers included), the oldest go. A trace that cannot be written
    is counted and logged, and lost.

    Args:
        folder: exists and is writable (`check_folder`).
        most: files to keep.
        rank: data-parallel rank; part of the names.
        count: called with the outcome of each trace.
    """

    def __init__(
        self, folder: Path, most: int, rank: int, count: Callable[[Outcome], None]
    ) -> None:
        self._folder = folder
        self._most = most
        self._rank = rank
        self._count = count
        self._queue: queue.Queue[Finished] = queue.Queue(WAITING)
        self._kept = deque(own_files(folder, rank))
        self._lost = 0
        self._complained = -COMPLAINTS_EVERY
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="memento-traces", daemon=True).start()

    def put(self, request: Finished) -> None:
        """Hand over a finished request; never waits."""
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            self._lose(f"more than {WAITING} traces wait to be written")

    def drain(self) -> None:
        """Wait until everything handed over so far is written or lost."""
        self._queue.join()

    def _run(self) -> None:
        while True:
            request = self._queue.get()
            try:
                self._write(request)
            except OSError as error:
                self._lose(f"{error.filename or self._folder}: {error.strerror}")
            except Exception:  # serving goes on, whatever is wrong with one trace
                logger.exception("memento: a trace could not be made")
                self._lose("see the error above")
            finally:
                self._queue.task_done()

    def _write(self, request: Finished) -> None:
        text = json.dumps(build_trace(request, self._rank), separators=(",", ":"))
        path = self._folder / file_name(request.rid, request.wall, self._rank)
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._count("written")
        self._kept.append(path)
        while len(self._kept) > self._most:
            self._kept.popleft().unlink(missing_ok=True)

    def _lose(self, why: str) -> None:
        self._count("lost")
        with self._lock:
            self._lost += 1
            if monotonic() - self._complained < COMPLAINTS_EVERY:
                return
            self._complained = monotonic()
            lost, self._lost = self._lost, 0
        logger.error("memento: %d trace(s) lost: %s", lost, why)


def file_name(rid: str, wall: float, rank: int) -> str:
    """A new name that sorts by arrival; of the request id only harmless characters are kept."""
    when = datetime.fromtimestamp(wall, UTC).strftime("%Y%m%dT%H%M%S.%f")
    harmless = re.sub(r"[^A-Za-z0-9_-]", "_", rid)[:40]
    return f"{when}-r{rank}-{harmless}-{uuid4().hex[:12]}.json"


def own_files(folder: Path, rank: int) -> list[Path]:
    """The trace files of a rank, oldest first; nothing else in the folder is ever touched."""
    name = re.compile(rf"\d{{8}}T\d{{6}}\.\d{{6}}-r{rank}-[A-Za-z0-9_-]*-[0-9a-f]{{12}}\.json")
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))


def check_folder(text: str) -> Path:
    """Make sure that traces can be written to a folder, which is created if it is missing.

    Raises:
        ConfigError: it cannot be created or written to.
    """
    folder = Path(text).expanduser().resolve()
    probe = folder / f".probe-{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"trace_dir={text!r} is not a folder that can be written to: {error.strerror}"
        ) from None
    return folder
