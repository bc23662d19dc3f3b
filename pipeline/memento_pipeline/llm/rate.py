"""How much may be asked at once and per minute.

`RateLimit` holds requests or tokens per minute; `Slots` hands out places at the endpoints and
adapts their number: halved by an overload, a little more after each success (AIMD, as TCP does).

Every decision reads the clock once and hands the reading on: a pause that ends between two readings
would be over for one of them and not for the other, and nobody would be woken.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from math import isfinite
from time import time

WINDOW = 60.0
START = 4  # places at an endpoint when it has answered for the first time
OLD = 1 / 3  # of the time allowed: answers that take longer leave room for no more requests
TROUBLE = 5  # failures in a row, after which an endpoint pauses and is asked one by one


class RateLimit:
    """At most `per_minute` units in any 60 seconds, spread evenly.

    A bucket of one second's worth that fills at a rate such that bucket and refill together stay
    under the limit. A request larger than the bucket waits for a full one and leaves a debt, so it
    may overshoot by itself only.
    """

    def __init__(self, per_minute: float) -> None:
        self._size = max(1.0, per_minute / WINDOW)
        self._rate = max((per_minute - self._size) / WINDOW, per_minute / WINDOW / 60)
        self._level = self._size
        self._filled_at: float | None = None
        self._turn = asyncio.Lock()
        self._ended = asyncio.Event()

    async def acquire(self, units: float = 1.0) -> None:
        """Wait until `units` may be spent, or the run has stopped; callers are served in order."""
        async with self._turn:
            while not self._ended.is_set() and self._refill() < min(units, self._size):
                await sleep_until(self._ended, (min(units, self._size) - self._level) / self._rate)
            self._level -= units

    def end(self) -> None:
        """Let all who wait go: the run stops, and they would wait for their turns one by one."""
        self._ended.set()

    def correct(self, units: float) -> None:
        """Charge `units` more (or fewer, when negative): an estimate has become a fact."""
        self._level -= units

    def _refill(self) -> float:
        now = asyncio.get_running_loop().time()
        since = now - (self._filled_at if self._filled_at is not None else now)
        self._level = min(self._size, self._level + since * self._rate)
        self._filled_at = now
        # Waking a hair early would otherwise wait again for a sleep of zero, many times.
        return self._level + 1e-9


class Slot:
    """The adaptive limit of one endpoint.

    Until the endpoint has answered once, one request at a time goes there: a wrong key or address
    costs one call, however many are waiting. So it is again after a row of failures. Then a few,
    and with each answer two more until the first overload: a server that queues what it cannot do
    at once shows it by the time its answers take, and they must not grow older than allowed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(min(most, START))
        self.in_flight = 0
        self.proven = False
        self.paused_until = 0.0
        self._failures = 0  # in a row
        self._last_cut = float("-inf")
        self._starting = True  # until the first overload

    def room(self, now: float) -> bool:
        allowed = max(1, int(self.limit)) if self.proven else 1
        return now >= self.paused_until and self.in_flight < allowed

    def succeeded(self, age: float = 0.0) -> None:
        """More room: one place or a twentieth more for each full round of successes.

        Args:
            age: how long the answer took, as a part of the time allowed.
        """
        self.proven = True
        self._failures = 0
        if age > OLD:
            self._starting = False
            return
        more = 2.0 if self._starting else max(1 / self.limit, 0.05)
        self.limit = min(self.most, self.limit + more)

    def overloaded(self, sent: float, now: float) -> None:
        """Less room. What was sent before the last cut says nothing about the new limit."""
        self._starting = False
        if sent >= self._last_cut:
            self.limit = max(1.0, self.limit / 2)
            self._last_cut = now

    def failed(self, now: float, base: float, most: float) -> None:
        """A dead endpoint fails at once and so always has room: it must not attract the work."""
        self._failures += 1
        if self._failures >= TROUBLE:
            self.proven = False
            self.pause(now + backoff(self._failures, base, most))

    def pause(self, until: float) -> None:
        self.paused_until = max(self.paused_until, until)


class Slots:
    """Places at several endpoints, first come first served, the least loaded endpoint first.

    Args:
        clock: monotonic seconds; the event loop's by default.
    """

    def __init__(
        self, slots: list[Slot], concurrency: int, clock: Callable[[], float] | None = None
    ) -> None:
        self._clock = clock
        self._slots = slots
        self._free = concurrency
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self) -> int:
        """Index of the endpoint to use; give it back with `release`."""
        if not self._waiting and (index := self._pick(self._now())) is not None:
            return index
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise

    def release(self, index: int) -> None:
        self._slots[index].in_flight -= 1
        self._free += 1
        self._serve()

    def fail_waiting(self, error: Exception) -> None:
        """End all waits with an error: the run stops."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def _now(self) -> float:
        return self._clock() if self._clock else asyncio.get_running_loop().time()

    def _pick(self, now: float) -> int | None:
        open_ = [i for i, slot in enumerate(self._slots) if slot.room(now)]
        if not self._free or not open_:
            return None
        index = min(open_, key=lambda i: self._slots[i].in_flight / self._slots[i].limit)
        self._slots[index].in_flight += 1
        self._free -= 1
        return index

    def _serve(self) -> None:
        now = self._now()
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
            elif (index := self._pick(now)) is not None:
                self._waiting.popleft().set_result(index)
            else:
                self._wake_after_pause(now)
                return

    def _wake_after_pause(self, now: float) -> None:
        """Serve again when the next pause ends. A timer may come a tick early; then the pause is
        found to last still and the timer is set again."""
        if self._timer is not None:
            self._timer.cancel()
        paused = [slot.paused_until for slot in self._slots if slot.paused_until > now]
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(paused) - now, self._serve) if paused else None


async def sleep_until(ended: asyncio.Event, seconds: float) -> None:
    """Sleep, but not beyond the moment at which `ended` is set."""
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        pass


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a `Retry-After` header (seconds or HTTP date); None when unusable."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except ValueError:
            return None
    return max(0.0, seconds) if isfinite(seconds) else None


def backoff(failures: int, base: float, most: float) -> float:
    """Seconds before the next try: doubling, with full jitter over the upper half."""
    return min(most, base * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
