"""`sglang.launch_server` with memento, whose metrics and traces are timed and can be switched off.

They are on at first. A signal to the scheduler process switches them off or on, for requests that
come later; SGLang's own metrics stay on. So what they cost can be seen within one process, where
nothing else differs. Each signal also brings the counter `COUNTER` of `/metrics` up to date: the
seconds spent on them by each thread, by the clock in the scheduler, which is cheap to read, and in
CPU time in the writer, who waits for files. SGLang's child processes import this file again.
"""

from __future__ import annotations

import runpy
import signal
from collections.abc import Callable
from functools import wraps
from time import perf_counter, thread_time
from typing import Any

from memento_sgl.engine.runtime import Runtime
from memento_sgl.observe.observers import Observers
from memento_sgl.observe.trace.writer import TraceWriter
from memento_sgl.observe.watch import Watch

ON, OFF = signal.SIGUSR1, signal.SIGUSR2
COUNTER = "memento_benchmark_seconds"
TIMED = {
    Watch: ("__init__", "feed", "evicted", "voided", "retracted", "placed", "finished"),
    Observers: ("step_evicted", "read_tree"),
}
"""All that the scheduler calls; `feed` includes what is done without anybody watching, too."""


class Stopwatch:
    """Seconds of one thread within the functions that it wraps; nested calls count once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds = 0.0
        self._running = False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            started = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self._clock() - started
                self._running = False

        return call

    def take(self) -> float:
        """The seconds since the last call of this."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def install() -> None:
    """Time the functions of `TIMED` and the writer, and listen to the two signals."""
    watches = {"scheduler": Stopwatch(perf_counter), "writer": Stopwatch(thread_time)}
    for owner, names in TIMED.items():
        for name in names:
            setattr(owner, name, watches["scheduler"].timed(getattr(owner, name)))
    write = watches["writer"].timed(TraceWriter._write)
    TraceWriter._write = write  # type: ignore[method-assign]
    original = Runtime.attach

    def attach(runtime: Runtime, scheduler: Any) -> None:
        from prometheus_client import Counter  # not before SGLang has prepared it

        original(runtime, scheduler)
        observers = runtime.observers
        counter = Counter(COUNTER, "Time spent on metrics and traces.", ["thread"])

        def switch(number: int, _frame: object) -> None:
            runtime.observers = observers if number == ON else None
            for thread, watch in watches.items():
                counter.labels(thread).inc(watch.take())

        for one in (ON, OFF):
            signal.signal(one, switch)

    Runtime.attach = attach  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
