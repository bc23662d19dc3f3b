"""Follows a request as it runs, and tells the sinks of its process.

Nothing here exists unless somebody wants to know. What happens per token costs nothing: a request
is looked at when a marker arrives and when its row changes. Between two steps of a model all code
is cold, so markers are only put down when they arrive, and told together when their memento closes.
"""

from __future__ import annotations

from time import perf_counter, time
from typing import TYPE_CHECKING, Any, NamedTuple

from memento_sgl.observe.sink import Event
from memento_sgl.rule.block_events import read_marker
from memento_sgl.rule.emission import is_forced

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memento_sgl.observe.observers import Observers
    from memento_sgl.request.state import RequestState
    from memento_sgl.rule.machine import Block, Eviction


class Arrived(NamedTuple):
    """A marker of the output: when it was read, and how many tokens were evicted by then."""

    at: float
    logical: int
    token: int
    evicted: int


class Watch:
    """Follows one request from its arrival in the scheduler to its end.

    Attributes:
        arrived: when that was, by the monotonic clock; `wall`: by the calendar.
    """

    __slots__ = (
        "_at_once",
        "_edited",
        "_followers",
        "_lost",
        "_structure",
        "_told",
        "_untold",
        "arrived",
        "rid",
        "state",
        "wall",
    )

    def __init__(self, observers: Observers, rid: str, state: RequestState) -> None:
        self.rid = rid
        self.state = state
        self.arrived = perf_counter()
        self.wall = time()
        self._at_once, self._structure = observers.at_once, observers.structure
        self._edited = 0  # most evictions that the row ever reflected: more is no replay
        self._lost = False  # retracted, not placed again yet
        self._told = state.machine.copy()  # behind the request's own by the markers in `_untold`
        self._untold: list[Arrived] = []
        self._followers = [sink.follow(self) for sink in observers.sinks]

    def feed(self, tokens: Sequence[int], start: int) -> list[Eviction]:
        """Feed output tokens to the machine, and put markers down."""
        now, machine, evicted = perf_counter(), self.state.machine, self.state.evicted
        due = machine.feed_all(tokens, start)
        self._untold += [
            Arrived(now, index, token, evicted)
            for index, token in enumerate(tokens, start)
            if token in machine.classes
        ]
        if self._at_once or len(machine.blocks) > len(self._told.blocks):
            self._tell_markers()
        return due

    def _tell_markers(self) -> None:
        """Tell what the markers meant that arrived since the last call."""
        if not self._untold:
            return
        machine, config = self._told, self.state.config
        constrained = config.emission != "off"
        for at, index, token, evicted in self._untold:
            row = index - evicted
            if constrained and is_forced(machine, index, config, machine.markers, self._structure):
                self._tell(Event("forced", at, index, row))
            events, _ = read_marker(machine, index, token)
            for kind, _, tokens in events:
                block: Block | None = machine.blocks[-1] if kind == "memento_close" else None
                self._tell(Event(kind, at, index, row, tokens, block))
        self._untold.clear()

    def evicted(self, eviction: Eviction, *, decoding: bool) -> None:
        """The row has just lost the span of `eviction`."""
        applied = self.state.applied
        kind = "replay" if applied <= self._edited else "evict"
        self._edited = max(self._edited, applied)
        self._happened(kind, eviction.point, eviction=eviction, decoding=decoding)

    def voided(self) -> None:
        """A decode result was ignored; the step is done again."""
        self._happened("void", self.state.length)

    def retracted(self, newest: int) -> None:
        """The request is about to lose its row, which holds everything before `newest`, its newest
        token; the state still says what was evicted from it."""
        self._happened("retract", newest)
        self._lost = True

    def placed(self, known_rows: int, *, more_to_prefill: bool) -> None:
        """A prefill step for the request is about to run.

        Args:
            known_rows: rows that need no prefill.
            more_to_prefill: another step will follow.
        """
        known = known_rows + self.state.evicted
        if self._lost:
            self._lost = False
            self._happened("resume", known)
        if not more_to_prefill:
            self._happened("place", known)

    def finished(self, req: Any, record: Mapping[str, Any]) -> None:
        """The request has ended; `record` is its accounting."""
        self._tell_markers()
        for follower in self._followers:
            follower.finished(req, record)

    def _happened(self, kind: str, index: int, **more: Any) -> None:
        """Tell something other than a marker, behind the markers before it."""
        self._tell_markers()
        self._tell(Event(kind, perf_counter(), index, self.state.row(index), **more))

    def _tell(self, event: Event) -> None:
        for follower in self._followers:
            follower.event(event)
