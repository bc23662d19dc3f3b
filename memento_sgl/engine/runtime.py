"""One object per scheduler process: the options, and what keeps track of its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memento_sgl.admission.budget import Admission
from memento_sgl.engine.constrained import ConstrainedEmission
from memento_sgl.engine.positions import Positions
from memento_sgl.engine.redo import RedoQueues
from memento_sgl.engine.scheduler_access import SchedulerAccess
from memento_sgl.errors import RequestError
from memento_sgl.observe.observers import Observers, observers_of
from memento_sgl.observe.watch import Watch
from memento_sgl.request.overrides import check_options, has_grammar, options_of
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import RequestOptions

if TYPE_CHECKING:
    from collections.abc import Sequence


class Runtime:
    """Eviction state of one scheduler process.

    Attributes:
        redo: requests that wait for an eviction or a redone step.
        positions: tokens evicted, by request slot.
        emission: requests whose tokens are constrained.
        admission: who may come in.
        scheduler: SGLang's.
        observers: metrics, traces and debug lines; None: nobody wants to know.
        evictions: spans that left a row so far, those replayed after a retraction included.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scheduler = SchedulerAccess()
        self.redo = RedoQueues()
        self.positions = Positions()
        self.emission = ConstrainedEmission(settings, self.scheduler)
        self.admission = Admission(settings.config)
        self.observers: Observers | None = None
        self.evictions = 0
        self._marker_tokens = frozenset(settings.markers.classes)

    def attach(self, scheduler: Any) -> None:
        """Bind to the scheduler's pools once they exist.

        Raises:
            ConfigError: the engine settled on something that eviction does not support.
        """
        self.scheduler.attach(scheduler)
        self.positions.attach(self.scheduler.table)
        self.observers = observers_of(scheduler, self.settings.config, self.settings.structure)

    def new_request(self, req: Any, *, probe: bool = False) -> RequestState:
        """State for a request; bad options (refused before it came here) abort it alone.

        A probe is a request of the server's own health check: nobody watches those.
        """
        try:
            state = self._state_of(req)
        except RequestError as error:
            req.set_finish_with_abort(str(error))
            state = self.without_prompt(req)
        if self.observers is not None and state.config.enable and not probe:
            state.watch = Watch(self.observers, req.rid, state)
        return state

    def _state_of(self, req: Any) -> RequestState:
        params = req.sampling_params
        options = options_of(params.custom_params)
        prompt = req.origin_input_ids
        if req.input_embeds is not None:  # SGLang puts token 1 in place of each
            options = options.model_copy(update={"assistant_start": len(prompt)})
        if req.session is not None:  # validation has seen this turn's tokens only
            grammar = has_grammar(params, require_reasoning=req.require_reasoning)
            check_options(params.custom_params, prompt, self.settings, grammar=grammar)
        return RequestState(prompt, self.settings.config, self.settings.markers, options)

    def without_prompt(self, req: Any) -> RequestState:
        """State for a request that ends at once: SGLang has put one token in its prompt's place."""
        options = RequestOptions(enable=False)
        config, markers, _ = self.settings
        return RequestState(req.origin_input_ids, config, markers, options)

    def observe(self, batch: Any, ignored: Sequence[Any]) -> None:
        """After a result was processed: find the requests whose newest token makes a span due."""
        for req in batch.reqs:
            output = req.output_ids
            if not output or output[-1] not in self._marker_tokens:
                continue
            if req in ignored or req.is_retracted or not self._read(req.memento, output):
                continue
            if req.finished():
                continue
            self.redo.make_due(req, in_flight=self.scheduler.in_flight(req))

    def _read(self, state: RequestState, output: Sequence[int]) -> bool:
        """Take new output; true if it made an eviction due. Admission learns finished blocks."""
        blocks, since = len(state.machine.blocks), state.open_since
        due = state.observe(output)
        if len(state.machine.blocks) > blocks:
            self.admission.learn(state, since)
        return due

    def take_voided(self, batch: Any) -> list[Any]:
        """The requests of a decode batch whose result must be ignored; counts it as consumed."""
        ignored = self.redo.take_voided(batch.reqs)
        for req in ignored:
            if (watch := req.memento.watch) is not None:
                watch.voided()
        return ignored

    def feed_replays(self, batch: Any) -> None:
        """Put the tokens to be read again where the next decode step looks for its input."""
        inputs = self.redo.next_inputs(batch.reqs, overlap=self.scheduler.overlap)
        if not inputs:
            return
        reqs = [each.req for each in inputs]
        with self.scheduler.between_forwards():
            slots = [req.kv.req_pool_idx for req in reqs]
            self.scheduler.set_inputs(slots, [each.token for each in inputs])
            self.emission.reload(reqs)

    def place(self, batch: Any) -> None:
        """After a prefill batch got its slots: their offsets and states of emission."""
        for req in batch.reqs:
            req.cached_tokens_device = req.cached_tokens  # logical, and there is no other source
        self.positions.place(batch)
        self.emission.place(batch.reqs)
        if self.observers is not None:
            for req in batch.reqs:
                if (watch := req.memento.watch) is not None:
                    unfinished = req.inflight_middle_chunks > 0
                    watch.placed(req.prefix_len, more_to_prefill=unfinished)

    def forget(self, req: Any) -> None:
        """The request's row is gone: nothing is due, voided or redone any more."""
        if (watch := req.memento.watch) is not None:
            watch.retracted(len(req.origin_input_ids) + len(req.output_ids) - 1)
        req.memento.reset()
        self.redo.forget(req)
        self.emission.forget(req)


_current: Runtime | None = None


def install(settings: Settings) -> Runtime:
    """Create this process's runtime."""
    global _current
    _current = Runtime(settings)
    return _current


def current() -> Runtime:
    """This process's runtime; hooks run only after `install`."""
    assert _current is not None
    return _current
