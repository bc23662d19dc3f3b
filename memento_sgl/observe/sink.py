"""What is told of requests, and who can be told: one stream of events, any number of sinks.

A sink belongs to the scheduler process, the followers that it makes to a request each. Whoever
wants to know something else writes one more sink.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from memento_sgl.observe.watch import Watch
    from memento_sgl.rule.machine import Block, Eviction


class Event(NamedTuple):
    """One thing that happened to a request.

    Attributes:
        kind: that of a marker (`rule.block_events`), or
            forced: the marker told next was the only token permitted;
            evict, replay: the row lost a span, for the first time or after a retraction again;
            void: a decode result was ignored; retract: the row is about to go; resume: a retracted
            request begins again; place: its last prefill step is about to run.
        time: of the monotonic clock.
        logical: logical index of the marker, of the eviction's point, or behind all that is known.
        row: row index of the same; after the eviction.
        tokens: see `BlockEvent`.
        block: the one whose memento has closed.
        eviction: what the row lost.
        decoding: it did between two decode steps; else between two segments of a prefill.
    """

    kind: str
    time: float
    logical: int
    row: int
    tokens: int | None = None
    block: Block | None = None
    eviction: Eviction | None = None
    decoding: bool = False


class Follower(Protocol):
    """Listens to one request."""

    def event(self, event: Event) -> None:
        """Called in order. What is not about a marker is told when it happens: the request's state
        may be read."""

    def finished(self, req: Any, record: Mapping[str, Any]) -> None:
        """The request of SGLang has ended; `record` is its accounting."""


class Sink:
    """Listens to a scheduler process.

    Attributes:
        at_once: markers are told as they arrive, and not together when their memento closes.
    """

    at_once = False

    def follow(self, watch: Watch) -> Follower:
        """A request has arrived."""
        raise NotImplementedError

    def step_evicted(self, requests: int) -> None:
        """A decode step was prepared for which this many rows were edited."""

    def read_tree(self, tree: Any) -> None:
        """A result was processed: our radix tree has counted what it did."""
