"""When the automaton of constrained emission is made, follows requests, and rests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from memento_sgl.engine.automaton import EmissionAutomaton

if TYPE_CHECKING:
    from memento_sgl.engine.scheduler_access import SchedulerAccess
    from memento_sgl.request.settings import Settings


class ConstrainedEmission:
    """The requests with constrained emission that hold a row; they leave by themselves when SGLang
    forgets them. As long as there is one, the automaton follows all requests."""

    def __init__(self, settings: Settings, scheduler: SchedulerAccess) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._constrained: WeakSet[Any] = WeakSet()
        self._automaton: EmissionAutomaton | None = None

    @property
    def automaton(self) -> EmissionAutomaton | None:
        """None while nobody is constrained."""
        return self._automaton if self._constrained else None

    def place(self, reqs: Sequence[Any]) -> None:
        """Let the automaton follow requests that got their slots."""
        newly = [req for req in reqs if req.memento.config.emission != "off"]
        if not (newly or self._constrained):
            return
        if self._automaton is None:
            self._automaton = self._make()
        for req in reqs:
            req.memento.observe(req.output_ids)  # a retracted request's last plain tokens
        with self._scheduler.between_forwards():
            if not self._constrained:
                self._automaton.reset()
            self._load(self._automaton, reqs)
        self._constrained.update(newly)

    def reload(self, reqs: Sequence[Any]) -> None:
        """A step of these is done again; `between_forwards` only."""
        if (automaton := self.automaton) is not None:
            self._load(automaton, reqs)

    def forget(self, req: Any) -> None:
        """The row of `req` is gone."""
        self._constrained.discard(req)

    @staticmethod
    def _load(automaton: EmissionAutomaton, reqs: Sequence[Any]) -> None:
        automaton.load([req.kv.req_pool_idx for req in reqs], [req.memento for req in reqs])

    def _make(self) -> EmissionAutomaton:
        table, vocabulary = self._scheduler.table, self._scheduler.vocabulary
        _, markers, structure = self._settings
        return EmissionAutomaton(len(table), vocabulary, markers, structure, table.device)
