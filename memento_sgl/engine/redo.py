"""What decode steps still owe to requests: spans to evict, results to ignore, tokens to read again.
Plain Python; a request is in a queue exactly while it has something to do there.

    step n      its result holds the marker that makes a span due       due
    step n + 1  in flight by then (overlap): its row held the span      voided
    step n + 2  the row lacks the span; reads what n + 1 has read       replaying, reread

In restart mode every token of the memento is read again, and all results but the last are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from memento_sgl.request.state import RequestState
    from memento_sgl.rule.machine import Eviction


class Input(NamedTuple):
    """What the next decode step reads for a request; `logical` is its index."""

    req: Any
    logical: int
    token: int


class RedoQueues:
    """The requests of one scheduler process whose decode steps are not plain ones.

    Attributes:
        due: requests with an eviction to apply before their next decode step.
        voided: how many decode results to come must be ignored, by request.
        replaying: the logical index that the next decode step reads once more, by request.
        reread: requests whose step being prepared must not count for penalties: a later one does.
    """

    def __init__(self) -> None:
        self.due: set[Any] = set()
        self.voided: dict[Any, int] = {}
        self.replaying: dict[Any, int] = {}
        self.reread: set[Any] = set()
        self._fed: list[Input] = []

    def make_due(self, req: Any, *, in_flight: bool) -> None:
        """A span of `req` has to go; `in_flight`: a step runs that still sees it."""
        self.due.add(req)
        if in_flight:
            self._void(req, 1)

    def rewind(self, req: Any, eviction: Eviction) -> None:
        """The next decode steps of `req` read the tokens from `eviction.resume` on once more."""
        self.replaying[req] = eviction.resume
        if known := eviction.point - eviction.resume:
            self._void(req, known)

    def _void(self, req: Any, results: int) -> None:
        self.voided[req] = self.voided.get(req, 0) + results

    def take_voided(self, reqs: Sequence[Any]) -> list[Any]:
        """Those of a decode batch whose result must be ignored; counts it as consumed."""
        if not self.voided:
            return []
        ignored = [r for r in reqs if r in self.voided and not r.is_retracted]
        for req in ignored:
            self.voided[req] -= 1
            if self.voided[req] == 0:
                del self.voided[req]
        return ignored

    def next_inputs(self, reqs: Sequence[Any], *, overlap: bool) -> list[Input]:
        """The tokens that the decode step being prepared for `reqs` reads once more.

        Args:
            overlap: the step after it will be prepared before its result is there.
        """
        self._fed = []
        for req in reqs:
            if req not in self.replaying:
                continue
            index = self.replaying.pop(req)
            if req.finished():
                continue
            state: RequestState = req.memento
            if index < state.prompt_len:
                token = req.origin_input_ids[index]
            else:
                token = req.output_ids[index - state.prompt_len]
            self._fed.append(Input(req, index, token))
            more = index + 1 < state.length
            if more:
                self.replaying[req] = index + 1
            if more or overlap:
                self.reread.add(req)
        return self._fed

    def put_off(self) -> None:
        """The step of `next_inputs` is not run now: the next one reads the same tokens."""
        for req, index, _ in self._fed:
            self.replaying[req] = index

    def holds(self, req: Any) -> bool:
        """Whether the row of `req` is not what its tokens say, and will be."""
        return req in self.due or req in self.voided or req in self.replaying

    def forget(self, req: Any) -> None:
        """The row of `req` is gone: nothing is due, voided or redone any more."""
        self.due.discard(req)
        self.voided.pop(req, None)
        self.replaying.pop(req, None)
        self.reread.discard(req)
