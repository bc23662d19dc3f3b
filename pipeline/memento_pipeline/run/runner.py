"""Driving many traces through the stages, a bounded number at a time.

    source ─► admit ─► split ─► score ─► segment ─► summarize ─► status
                 each arrow is one transaction of the store; a restart goes on after the last one

Memory holds the traces that are open, never the input or the output. What goes wrong with one trace
is that trace's reason; what goes wrong with an endpoint or the store ends the run, with everything
that was done kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from memento_pipeline.llm.client import Llm
from memento_pipeline.llm.paid import Meter, all_done
from memento_pipeline.records import Record, Rejected, Status, Trace, Usage
from memento_pipeline.store.folder import Store
from memento_pipeline.store.schema import STAGES, Seen
from memento_sgl.errors import (
    AnswerError,
    EndpointError,
    RefusedError,
    StoppedError,
    StoreError,
)

log = logging.getLogger(__name__)

MOST_FAILED_IN_A_ROW = 25
MOST_REASONS = 1000  # different ones that are counted; the store has them all

Source = Generator[tuple[int, Trace | Rejected], None, None]
"""Rows in input order, each with its number."""


class Work(Protocol):
    """The stages; see `stages.Stages`."""

    def filtered(self, trace: Trace) -> str | None: ...
    def read(self, stage: str, result: str) -> Record: ...
    async def do(
        self, stage: str, trace: Trace, done: dict[str, Record], meter: Meter
    ) -> Record: ...
    def verdict(self, trace: Trace, done: dict[str, Record]) -> str | None: ...


class Summary(NamedTuple):
    """How a run ended. `seen` counts what this run did: ok, filtered, failed, rejected, finished
    (before), staged (one stage of it), not_ready (the stage before is missing)."""

    seen: Counter[str]
    reasons: Counter[str]
    seconds: float
    stopped: str | None  # why the run ended early


class Runner:
    """One run over a source.

    Args:
        stages: those to carry out, consecutive; the ones before must be in the store.
        most_open: traces that are worked on at the same time.
        llm: the endpoints; None for the offline baseline.
    """

    def __init__(
        self,
        store: Store,
        work: Work,
        stages: Sequence[str],
        most_open: int,
        llm: Llm | None = None,
    ) -> None:
        self._store = store
        self._work = work
        self._stages = stages
        self._llm = llm
        self._places = asyncio.Semaphore(most_open)
        self._open: set[asyncio.Task[None]] = set()
        self._stopped: Exception | None = None
        self.seen: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.open_now = 0
        self._failed_in_a_row = 0

    def stop(self, error: Exception) -> None:
        """Take no further trace, start no further stage and send no further request; what is in
        flight may end. The first reason counts."""
        if self._stopped is None:
            self._stopped = error
        if self._llm is not None:
            self._llm.stop(error)

    @property
    def stopped(self) -> Exception | None:
        return self._stopped or (self._llm.stopped if self._llm is not None else None)

    def in_flight(self) -> tuple[int, float]:
        """Requests that are being answered, and seconds until the last of them is given up."""
        return (0, 0.0) if self._llm is None else self._llm.in_flight()

    async def run(self, source: Source, *, admit: bool = True) -> Summary:
        """Work through the source.

        Args:
            admit: the rows are new to the store; else they come from it.

        Raises:
            DataError: the input cannot be read further; the traces before it are done.
        """
        started = time.monotonic()
        # Readers may hold files and SQLite handles: one thread opens, reads and closes them.
        with ThreadPoolExecutor(1, "reader") as reader:
            try:
                await self._feed(source, reader, admit)
            finally:
                await all_done(self._open)
                await asyncio.get_running_loop().run_in_executor(reader, source.close)
        return Summary(
            seen=self.seen,
            reasons=self.reasons,
            seconds=time.monotonic() - started,
            stopped=None if self.stopped is None else str(self.stopped),
        )

    async def _feed(self, source: Source, reader: ThreadPoolExecutor, admit: bool) -> None:
        loop, end = asyncio.get_running_loop(), object()
        while self.stopped is None:
            await self._places.acquire()
            row: Any = await loop.run_in_executor(reader, next, source, end)
            if row is end:
                return
            task = asyncio.create_task(self._guarded(*row, admit=admit))
            self._open.add(task)
            task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._places.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stop(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _guarded(self, ordinal: int, row: Trace | Rejected, *, admit: bool) -> None:
        if isinstance(row, Rejected):
            await self._reject(row)
            return
        trace = await self._admit(row, ordinal) if admit else row
        if trace is None:
            return
        self.open_now += 1
        try:
            await self._through(trace)
        except (StoppedError, StoreError) as error:
            self.stop(error)
        except (AnswerError, EndpointError) as error:
            # An endpoint that failed for good is no fault of the trace: that stays unfinished.
            if self.stopped is None:
                await self._fail(trace, error, str(error))
        except Exception as error:
            log.exception("a stage broke", extra={"trace": trace.id})
            await self._fail(trace, error, f"{type(error).__name__}: {error}")
        finally:
            self.open_now -= 1

    async def _fail(self, trace: Trace, error: Exception, reason: str) -> None:
        await self._finish(trace, Status.FAILED, reason)
        if isinstance(error, RefusedError) and (self._llm is None or self._llm.answered):
            return  # about this trace: others were answered
        self._failed_in_a_row += 1
        if self._failed_in_a_row == MOST_FAILED_IN_A_ROW:
            self.stop(
                StoppedError(
                    f"{MOST_FAILED_IN_A_ROW} traces failed in a row, the last one with: {reason}. "
                    "Repair the cause, then resume with --retry-failed"
                )
            )

    async def _reject(self, row: Rejected) -> None:
        await self._store.reject(row)
        self.seen["rejected"] += 1
        self._count(row.reason)

    async def _admit(self, trace: Trace, ordinal: int) -> Trace | None:
        """The trace under its final id, or None when there is nothing to do."""
        name, seen = await self._store.admit(trace, ordinal)
        if seen is Seen.DUPLICATE:
            place = trace.provenance
            await self._reject(
                Rejected(
                    file=str(place.get("file", "")),
                    row=int(place.get("row", ordinal + 1)),
                    reason=f"the same as an earlier row (id {name})",
                    id=trace.id,
                )
            )
            return None
        if seen is Seen.FINISHED:
            self.seen["finished"] += 1
            return None
        if seen is Seen.EDITED:
            log.info("an edited row takes the place of the old one", extra={"trace": name})
            self._count("edited since an earlier run: converted again")
        return trace.model_copy(update={"id": name})

    async def _through(self, trace: Trace) -> None:
        if reason := self._work.filtered(trace):
            await self._finish(trace, Status.FILTERED, reason)
            return
        stored = self._store.results(trace.id)
        done = {stage: self._work.read(stage, result.result) for stage, result in stored.items()}
        for stage in self._stages:
            if stage in done:
                continue
            if any(before not in done for before in STAGES[: STAGES.index(stage)]):
                self.seen["not_ready"] += 1
                return
            if self.stopped is not None:
                return
            meter = Meter()
            done[stage] = await self._work.do(stage, trace, done, meter)
            await self._store.finish_stage(
                trace.id, stage, done[stage].model_dump_json(), meter.usage
            )
        if len(done) < len(STAGES):
            self.seen["staged"] += 1
            return
        if reason := self._work.verdict(trace, done):
            await self._finish(trace, Status.FILTERED, reason)
        else:
            await self._finish(trace, Status.OK, None)
        self._failed_in_a_row = 0

    async def _finish(self, trace: Trace, status: Status, reason: str | None) -> None:
        await self._store.finish(trace.id, status, reason)
        self.seen[status.value] += 1
        if reason is not None:
            self._count(reason)
            log.info("trace left out", extra={"trace": trace.id, "reason": reason})

    def _count(self, reason: str) -> None:
        known = reason in self.reasons or len(self.reasons) < MOST_REASONS
        self.reasons[reason if known else "other reasons"] += 1


def total_usage(parts: Sequence[Usage]) -> Usage:
    """Usage of several stages together; unknown when a part of it is."""

    def added(values: list[Any]) -> Any:
        return None if any(value is None for value in values) else sum(values)

    return Usage(
        calls=sum(part.calls for part in parts),
        cached_calls=sum(part.cached_calls for part in parts),
        prompt_tokens=added([part.prompt_tokens for part in parts]),
        completion_tokens=added([part.completion_tokens for part in parts]),
        cached_tokens=added([part.cached_tokens for part in parts]),
        dollars=added([part.dollars for part in parts]),
    )
