"""Many questions at once: threads, a progress bar, and an end that loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memento_frontend.answers_file import AnswersFile, Item

ABORT_INTERVAL = 0.2  # seconds


class Asking:
    """The items of one run, in threads that write what they get into `answers`.

    Args:
        title: what is counted, for the bar on standard error.
        total: items, those of earlier runs included.

    Attributes:
        stopping: set once the run ends early; what is running may give up.
    """

    def __init__(self, title: str, answers: AnswersFile, total: int, *, progress: bool) -> None:
        self._answers = answers
        self.total = total
        self.stopping = threading.Event()
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        self._task = self._bar.add_task(title, total=total, failed=answers.failed)

    @property
    def done(self) -> int:
        """Items in the file."""
        return self._answers.answered + self._answers.failed

    def all(
        self,
        one: Callable[[Item], None],
        items: Sequence[Item],
        concurrency: int,
        abort: Callable[[], None] | None = None,
    ) -> None:
        """Call `one` for each. The first exception, Ctrl-C included, ends the run and is raised
        when no thread works any more: what has not begun never does.

        Args:
            abort: ends what runs elsewhere; called again and again until the threads have ended.
        """

        def step(item: Item) -> None:
            if self.stopping.is_set():
                return
            try:
                one(item)
            except BaseException:
                self.stopping.set()  # before this thread takes the next item
                raise
            self._show()

        self._show()
        with self._bar, ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(step, item) for item in items]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop(futures, abort)
                raise

    def _stop(self, futures: Sequence[Future[None]], abort: Callable[[], None] | None) -> None:
        self.stopping.set()
        for future in futures:
            future.cancel()
        running = set(futures)
        while running:
            if abort is not None:
                abort()
            running = wait(running, timeout=ABORT_INTERVAL).not_done

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, failed=self._answers.failed)
