"""One run on a work folder: open, work, show, export, and say how it ended."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import zlib
from collections.abc import Generator, Sequence
from contextlib import AsyncExitStack, closing
from enum import IntEnum
from itertools import islice
from typing import NamedTuple, cast

from memento_pipeline.llm.client import Llm
from memento_pipeline.llm.paid import PaidLlm
from memento_pipeline.read.rows import read_traces
from memento_pipeline.records import Rejected, Trace
from memento_pipeline.run.progress import Display, View, duration
from memento_pipeline.run.run_options import RunOptions, Shard
from memento_pipeline.run.runner import Runner, Source, Summary
from memento_pipeline.run.stages import Stages
from memento_pipeline.store.folder import Store
from memento_pipeline.store.logs import LogFile
from memento_pipeline.store.schema import STAGES, Spent
from memento_pipeline.text.tokens import TokenCounter, load_counter
from memento_sgl.errors import StoppedError

log = logging.getLogger(__name__)


class Exit(IntEnum):
    """Exit codes. They tell the state of the folder, not only of the last run."""

    OK = 0  # every trace is ok
    ERROR = 1  # a defect of this program
    USAGE = 2  # options or input that cannot work
    FAILED = 3  # some traces failed: see --retry-failed
    FILTERED = 4  # some traces or rows were left out, none failed
    STOPPED = 5  # the run ended early (endpoint, budget, disk): run again to resume
    STORE = 6  # the work folder is locked, damaged or made with other settings
    INTERRUPTED = 130  # Ctrl-C: run again to resume


class InterruptedRunError(StoppedError):
    """Ctrl-C or SIGTERM."""


class Outcome(NamedTuple):
    """A finished run and the state of its folder."""

    summary: Summary
    counts: dict[str, int]
    spent: Spent
    interrupted: bool
    notes: tuple[str, ...] = ()  # what the run adapted to its endpoints
    cached_tokens: int | None = None  # of all prompt tokens spent; None: not reported

    @property
    def exit(self) -> Exit:
        if self.interrupted:
            return Exit.INTERRUPTED
        if self.summary.stopped:
            return Exit.STOPPED
        if self.counts.get("failed"):
            return Exit.FAILED
        if self.counts.get("filtered") or self.counts.get("rejected"):
            return Exit.FILTERED
        return Exit.OK


def rows(options: RunOptions) -> Source:
    """The input rows up to the limit that are in this run's shard, with their numbers."""
    reader = cast(
        Generator[Trace | Rejected, None, None],
        read_traces(options.inputs, options.read, out=options.out),
    )
    with closing(reader):
        for number, row in enumerate(islice(reader, options.limit)):
            if in_shard(row, options.shard):
                yield number, row


def in_shard(row: Trace | Rejected, shard: Shard) -> bool:
    """By a hash of the id, so that rows with the same id meet in the same shard."""
    name = row.id if isinstance(row, Trace) else f"{row.file}:{row.row}"
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % shard.parts == shard.part


def stored_rows(store: Store, limit: int | None) -> Source:
    """The unfinished traces of a store, for a stage of its own."""
    yield from enumerate(islice(store.traces(only=[None]), limit))


def run_stages(
    options: RunOptions,
    store: Store,
    *,
    stages: Sequence[str] = STAGES,
    total: int | None = None,
    display: bool = True,
) -> Outcome:
    """Carry out stages, `split` from the input and others from the store.

    Args:
        total: rows to come, for the display; None when unknown.
        display: progress on stderr.
    """
    with LogFile(options.out):
        return asyncio.run(_run(options, store, stages, total, display))


async def _run(
    options: RunOptions, store: Store, stages: Sequence[str], total: int | None, display: bool
) -> Outcome:
    counter: TokenCounter = load_counter(options.tokenizer)
    reads = stages[0] == "split"
    source = rows(options) if reads else stored_rows(store, options.limit)
    async with AsyncExitStack() as stack:
        llm, paid = None, None
        if options.endpoints and {"score", "summarize"} & set(stages):
            llm = await stack.enter_async_context(Llm(list(options.endpoints), options.ask))
            paid = PaidLlm(store, llm, options.endpoints, options.ask)
        work = Stages(options, counter, paid)
        runner = Runner(store, work, stages, options.most_open, llm)
        log.info("run starts", extra={"stages": list(stages), "models": options.models})
        _stop_on_signals(runner)
        ticker = None
        if display:
            shown = Display(total, lambda: _view(runner, store, paid))
            ticker = asyncio.create_task(shown.run())
        try:
            summary = await runner.run(source, admit=reads)
        finally:
            if ticker is not None:
                ticker.cancel()
                await asyncio.wait([ticker])
            if paid is not None:
                await paid.drain()
        log.info("run ends", extra={"seen": dict(summary.seen), "stopped": summary.stopped})
        interrupted = isinstance(runner.stopped, InterruptedRunError)
        notes = () if llm is None else tuple(llm.notes)
        return Outcome(
            summary, store.counts(), store.spent(), interrupted, notes, store.cached_tokens()
        )


def _view(runner: Runner, store: Store, paid: PaidLlm | None) -> View:
    seen = runner.seen
    return View(
        rows=sum(seen.values()),
        earlier=seen["finished"],
        ok=seen["ok"],
        failed=seen["failed"],
        filtered=seen["filtered"] + seen["rejected"],
        open=runner.open_now,
        spent=paid.spent if paid is not None else store.spent(),
        retries=paid.llm.retries if paid is not None else 0,
    )


def stopping(answers: int, seconds: float) -> str:
    """What Ctrl-C says: how long the end takes, and what a second one costs."""
    if not answers:
        return "stopping: no answer is in flight"
    count = f"{answers} answers are" if answers > 1 else "1 answer is"
    return (
        f"stopping: {count} in flight and awaited, for {duration(seconds)} at most (--timeout). "
        "Ctrl-C again ends at once: what is stored is safe, but what is in flight is lost and "
        "asked, and maybe paid, again"
    )


def _stop_on_signals(runner: Runner) -> None:
    """The first Ctrl-C ends the run in order; a second one ends it at once, which is safe too."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        runner.stop(InterruptedRunError("interrupted; what was done and paid is kept"))
        print(stopping(*runner.in_flight()), file=sys.stderr, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
