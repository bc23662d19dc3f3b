"""What a run shows while it works: traces, speed, tokens and money so far and to expect."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from memento_pipeline.store.schema import Spent

PLAIN_INTERVAL = 10.0  # seconds between lines when there is no terminal
LIVE_INTERVAL = 0.25


class View(NamedTuple):
    """The numbers of one moment. `rows` are done, with or without success; `earlier` of them were
    done before this run."""

    rows: int
    earlier: int
    ok: int
    failed: int
    filtered: int
    open: int
    spent: Spent
    retries: int


class Display:
    """A bar with a line below on a terminal, else a line every ten seconds; both on stderr.

    Args:
        total: rows to come, None when unknown.
        look: gives the numbers of the moment.
    """

    def __init__(
        self, total: int | None, look: Callable[[], View], console: Console | None = None
    ) -> None:
        self._total = total
        self._look = look
        self._console = console or Console(stderr=True)
        self._started = time.monotonic()
        self._spent_before = look().spent
        self._progress = Progress(
            TextColumn("traces"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("traces", total=total)
        self._live = Live(console=self._console, auto_refresh=False)

    async def run(self) -> None:
        """Refresh until cancelled."""
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(PLAIN_INTERVAL)
                self.print()
        with self._live:
            try:
                while True:
                    await asyncio.sleep(LIVE_INTERVAL)
                    self.draw()
            finally:
                self.draw()

    def draw(self) -> None:
        view = self._look()
        self._progress.update(self._task, completed=view.rows)
        self._live.update(Group(self._progress, Text(self.line(view))), refresh=True)

    def print(self) -> None:
        view = self._look()
        total = "?" if self._total is None else str(self._total)
        print(f"traces {view.rows}/{total}  {self.line(view)}", file=sys.stderr, flush=True)

    def line(self, view: View) -> str:
        """One line: states, time to go, tokens and dollars so far and projected."""
        parts = [f"ok {view.ok} filtered {view.filtered} failed {view.failed} open {view.open}"]
        done = view.rows - view.earlier
        share = None
        if self._total is not None and done > 0:
            to_do = self._total - view.earlier
            share = done / max(to_do, done)
            seconds = (time.monotonic() - self._started) * (1 - share) / share
            parts.append(f"left {duration(seconds)}")
        tokens = view.spent.prompt_tokens + view.spent.completion_tokens
        if view.spent.answers:
            parts.append(f"calls {view.spent.answers} tokens {tokens:,}")
        if view.spent.dollars:
            parts.append(f"${view.spent.dollars:.2f}")
            if share:
                now = view.spent.dollars - self._spent_before.dollars
                parts.append(f"of about ${self._spent_before.dollars + now / share:.2f}")
        if view.retries:
            parts.append(f"retries {view.retries}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """For people: 45s, 12m30s, 3h05m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
