"""Group commit: writes of many tasks, made durable together by one thread.

With `synchronous=FULL` a commit waits for the disk. Tasks that finish at the same time share one
commit: everything that is queued when the thread is free goes into one transaction. A write is
either wholly in that transaction or the caller gets the exception; its result is handed over only
after the commit, so what a caller has seen survives `kill -9` and a power cut.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from memento_sgl.errors import StoreError

T = TypeVar("T")
Write = Callable[[sqlite3.Connection], T]

MOST_PER_COMMIT = 512


class GroupCommit:
    """Owner of the one connection that writes.

    Args:
        connect: makes the connection; called in the writing thread, in autocommit mode.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._queue: queue.SimpleQueue[tuple[Write[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Write[T]) -> Future[T]:
        """Queue a write. It is carried out even when the future is cancelled: an answer that was
        paid for is kept although the task that asked is gone."""
        future: Future[T] = Future()
        if not self._thread.is_alive():
            raise StoreError(f"the store no longer takes writes: {self._broken or 'it is closed'}")
        self._queue.put((write, future))
        return future

    async def write(self, write: Write[T]) -> T:
        """Carry out and commit a write.

        Raises:
            StoreError: it could not be committed (disk full, damaged file).
        """
        return await asyncio.wrap_future(self.submit(write))

    def write_now(self, write: Write[T]) -> T:
        """The same from code that is not a coroutine."""
        return self.submit(write).result()

    def close(self) -> None:
        """Commit what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            connection = self._connect()
        except sqlite3.Error as error:
            self._fail(error)
            return
        try:
            while (batch := self._next_batch()) is not None:
                if (broken := self._commit(connection, batch)) is not None:
                    self._fail(broken)  # until it is closed: nobody may wait for a dead thread
                    return
        finally:
            connection.close()

    def _fail(self, error: BaseException) -> None:
        self._broken = error
        while (item := self._queue.get()) is not None:
            if item[1].set_running_or_notify_cancel():
                item[1].set_exception(StoreError(f"the store cannot be written: {error}"))

    def _next_batch(self) -> list[tuple[Write[Any], Future[Any]]] | None:
        item = self._queue.get()
        if item is None:
            return None
        batch = [item]
        while len(batch) < MOST_PER_COMMIT:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)  # close() waits for this batch first
                break
            batch.append(item)
        return batch

    def _commit(
        self, connection: sqlite3.Connection, batch: list[tuple[Write[Any], Future[Any]]]
    ) -> sqlite3.Error | None:
        """Write a batch and answer for it; an error here is one that ends all writing."""
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [write(connection) for write, _ in batch]
            connection.execute("COMMIT")
        except Exception as error:
            broken = self._roll_back(connection)
            failure: Exception = error
            if isinstance(error, sqlite3.Error):
                failure = StoreError(
                    f"the store could not be written ({error}); nothing of this write was kept. "
                    "Free disk space or repair the folder, then run the command again: it resumes"
                )
            for _, future in batch:
                if future.set_running_or_notify_cancel():
                    future.set_exception(failure)
            return broken
        for (_, future), result in zip(batch, results, strict=True):
            if future.set_running_or_notify_cancel():
                future.set_result(result)
        return None

    @staticmethod
    def _roll_back(connection: sqlite3.Connection) -> sqlite3.Error | None:
        # SQLite has rolled back by itself after "disk full" and some I/O errors.
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            return error
        return None
