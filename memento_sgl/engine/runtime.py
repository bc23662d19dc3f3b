"""One object per scheduler process: the options, the tensors indexed by request slot, and the
requests that wait for an eviction or a redone step.

    offsets[slot]   tokens evicted from the request in `slot`: rope position = row index + offset
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from memento_sgl.admission.forecast import Forecast, Retry, Rhythm
from memento_sgl.admission.pacing import Pacing
from memento_sgl.engine.automaton import EmissionAutomaton
from memento_sgl.engine.staging import staged
from memento_sgl.errors import ConfigError, RequestError
from memento_sgl.observe.watch import Observers, Watch, observers_of
from memento_sgl.request.state import (
    RequestState,
    Settings,
    check_options,
    has_grammar,
    options_of,
)
from memento_sgl.rule.config import RequestOptions
from memento_sgl.rule.machine import Eviction

if TYPE_CHECKING:
    from collections.abc import Sequence

MARKERS_PER_BLOCK = 4


class Runtime:
    """Eviction state of one scheduler process.

    Attributes:
        due: requests with an eviction to apply before their next decode step.
        voided: requests with decode results to come that must be ignored.
        replaying: requests whose next decode step reads a token that was read before.
        reread: requests whose step being prepared must not count for penalties: a later one does.
        evictions: spans that left a row so far, those replayed after a retraction included.
        evicting: false until the first eviction of the process, so that traffic without blocks
            pays nothing for positions.
        constrained: requests with constrained emission that hold a row; they leave this set by
            themselves when SGLang forgets them.
        observers: metrics, traces and debug lines; None: nobody wants to know.
        pacing: lets decode steps run between the segments of a prompt.
        rhythm: what finished blocks were like, for admission.
        retry: when an eviction may let another request in.
        forecast: what running and admitted requests will hold, while a prefill batch is put
            together; None when SGLang's own reservation counts.
    """

    def __init__(self, settings: Settings) -> None:
        self.config, self.markers, self.structure = settings
        self.marker_tokens = frozenset(self.markers.classes)
        self.due: set[Any] = set()
        self.voided: set[Any] = set()
        self.replaying: set[Any] = set()
        self.reread: set[Any] = set()
        self._fed: list[tuple[Any, int]] = []
        self.evictions = 0
        self.evicting = False
        self.constrained: WeakSet[Any] = WeakSet()
        self._automaton: EmissionAutomaton | None = None
        self.observers: Observers | None = None
        self.rhythm = Rhythm()
        self.retry = Retry()
        self.pacing = Pacing()
        self.forecast: Forecast | None = None
        self.offsets = torch.empty(0)
        self._scheduler: Any = None

    def attach(self, scheduler: Any) -> None:
        """Bind to the scheduler's pools once they exist.

        Raises:
            ConfigError: the engine settled on something that eviction does not support.
        """
        _check_engine(scheduler)
        table = scheduler.req_to_token_pool.req_to_token
        self._scheduler = scheduler
        if scheduler.page_size > 1:
            # The default copy kernel exists for speculative decoding only, and does not allow for
            # targets that overlap sources.
            scheduler.token_to_kv_pool_allocator.get_kvcache().use_native_move_kv_cache = True
        self.offsets = torch.zeros(table.shape[0], dtype=torch.int64, device=table.device)
        self.observers = observers_of(scheduler, self.config, self.structure)

    def new_request(self, req: Any, *, probe: bool = False) -> RequestState:
        """State for a request; bad options (already refused at the door) abort it alone.

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
        if req.session is not None:  # the door has seen this turn's tokens only
            grammar = has_grammar(params, require_reasoning=req.require_reasoning)
            settings = Settings(self.config, self.markers, self.structure)
            check_options(params.custom_params, prompt, settings, grammar=grammar)
        return RequestState(prompt, self.config, self.markers, options)

    def without_prompt(self, req: Any) -> RequestState:
        """State for a request that ends at once: SGLang has put one token in its prompt's place."""
        options = RequestOptions(enable=False)
        return RequestState(req.origin_input_ids, self.config, self.markers, options)

    def observe(self, batch: Any, ignored: Sequence[Any]) -> None:
        """After a result was processed: find the requests whose newest token makes a span due."""
        for req in batch.reqs:
            output = req.output_ids
            if not output or output[-1] not in self.marker_tokens:
                continue
            if req in ignored or req.is_retracted or not self._read(req.memento, output):
                continue
            if req.finished():
                continue
            self.due.add(req)
            if self._in_flight(req):
                req.memento.void += 1
                self.voided.add(req)

    def _read(self, state: RequestState, output: Sequence[int]) -> bool:
        """Take new output; true if it made an eviction due. Finished blocks teach the rhythm."""
        blocks, since = len(state.machine.blocks), state.open_since
        due = state.observe(output)
        if len(state.machine.blocks) > blocks:
            delimiters = 2 if self.config.mask_delimiters or self.config.restart_mode else 0
            gone = state.machine.blocks[-1].block_tokens + delimiters
            self.rhythm.learn(state.open_since - since, gone)
        return due

    def _in_flight(self, req: Any) -> bool:
        queue = getattr(self._scheduler, "result_queue", ())
        return any(req in launched.reqs for launched, _ in queue)

    def take_voided(self, batch: Any) -> list[Any]:
        """The requests of a decode batch whose result must be ignored; counts it as consumed."""
        if not self.voided:
            return []
        ignored = [r for r in batch.reqs if r in self.voided and not r.is_retracted]
        for req in ignored:
            req.memento.void -= 1
            if req.memento.void == 0:
                self.voided.discard(req)
            if (watch := req.memento.watch) is not None:
                watch.voided()
        return ignored

    def rewind(self, req: Any, eviction: Eviction) -> None:
        """The next decode steps of `req` read the tokens from `eviction.resume` on once more."""
        state: RequestState = req.memento
        state.replay = eviction.resume
        self.replaying.add(req)
        known = eviction.point - eviction.resume
        if known:
            state.void += known
            self.voided.add(req)

    def feed_replays(self, batch: Any) -> None:
        """Put the tokens to be read again where the next decode step looks for its input."""
        slots, tokens, states = [], [], []
        self._fed = []
        for req in batch.reqs:
            if req not in self.replaying:
                continue
            if req.finished():
                self.replaying.discard(req)
                continue
            state: RequestState = req.memento
            index = state.replay
            assert index is not None
            slots.append(req.kv.req_pool_idx)
            if index < state.prompt_len:
                tokens.append(req.origin_input_ids[index])
            else:
                tokens.append(req.output_ids[index - state.prompt_len])
            states.append(state)
            self._fed.append((req, index))
            state.replay = index + 1
            if state.replay == state.length:
                state.replay = None
                self.replaying.discard(req)
            if state.replay is not None or self._scheduler.enable_overlap:
                self.reread.add(req)
        if not slots:
            return
        with self._between_forwards():
            buffer = self._scheduler.future_map.output_tokens_buf
            where, what = staged([slots, tokens], buffer.device)
            buffer[where] = what.to(buffer.dtype)
            if (automaton := self.automaton) is not None:
                automaton.load(slots, states)

    def put_off(self) -> None:
        """The step that was fed is not run now: the next one reads the same tokens."""
        for req, index in self._fed:
            req.memento.replay = index
            self.replaying.add(req)

    def _between_forwards(self) -> Any:
        """Device work inside happens after the step in flight has written the tokens and states
        of its slots, before the next step reads them. Without overlap scheduling forward passes
        run on the current stream."""
        overlap = self._scheduler.enable_overlap
        return self._scheduler.forward_stream_ctx if overlap else nullcontext()

    def move_kv(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy the KV of slots `source` to slots `target`, int64 `[N]` each, which may overlap.

        After the step in flight, which still reads both where they are, before the next one.
        """
        streams = self._scheduler.device_module
        made_on = streams.current_stream()
        with self._between_forwards():
            copied_on = streams.current_stream()
            copied_on.wait_stream(made_on)
            self._scheduler.token_to_kv_pool_allocator.get_kvcache().move_kv_cache(target, source)
        for slots in (target, source):
            if slots.is_cuda:  # not to be reused on `made_on` before the copy has read them
                slots.record_stream(copied_on)

    def place(self, batch: Any) -> None:
        """After a prefill batch got its slots: their offsets and states of emission."""
        states = [req.memento for req in batch.reqs]
        slots = [req.kv.req_pool_idx for req in batch.reqs]
        for req in batch.reqs:
            req.cached_tokens_device = req.cached_tokens  # logical, and there is no other source
        if self.evicting or any(state.evicted for state in states):
            self.set_offsets(slots, [state.evicted for state in states])
            now = batch.orig_seq_lens
            batch.orig_seq_lens = staged(logical_lengths(batch.reqs), now.device, now.dtype)
        self._constrain(batch.reqs, slots, states)
        if self.observers is not None:
            for req in batch.reqs:
                if (watch := req.memento.watch) is not None:
                    unfinished = req.inflight_middle_chunks > 0
                    watch.placed(req.prefix_len, more_to_prefill=unfinished)

    def set_offsets(self, slots: list[int], evicted: list[int]) -> None:
        self.evicting = True
        where, what = staged([slots, evicted], self.offsets.device)
        self.offsets[where] = what

    def forget(self, req: Any) -> None:
        """The request's row is gone: nothing is due, voided or redone any more."""
        if (watch := req.memento.watch) is not None:
            watch.retracted(len(req.origin_input_ids) + len(req.output_ids) - 1)
        req.memento.reset()
        for waiting in (self.due, self.voided, self.replaying, self.reread, self.constrained):
            waiting.discard(req)

    def rhythm_of(self, state: RequestState) -> tuple[float, float]:
        """Tokens from memento to memento, and how many of them go, as expected of a request; the
        caps stand in until a block was seen. Zero: its evictions cannot be foreseen."""
        config = state.config
        if not config.evicts:
            return 0.0, 0.0
        block, memento = config.max_block_tokens, config.max_summary_tokens
        if not self.rhythm.count and block and memento:
            return block + memento + MARKERS_PER_BLOCK, block
        return self.rhythm.cycle, self.rhythm.gone

    @property
    def pool_size(self) -> int:
        """KV slots of this server."""
        return int(self._scheduler.max_total_num_tokens)

    @property
    def waiting(self) -> list[Any]:
        """SGLang's waiting queue."""
        queue: list[Any] = self._scheduler.waiting_queue
        return queue

    def send(self, req: Any) -> None:
        """Let a request that finished outside of a batch go out."""
        self._scheduler.output_streamer.stream_output([req], req.return_logprob)

    @property
    def longest_prompt(self) -> int:
        """Prompts of this many tokens are refused whatever they evict; SGLang's own margin."""
        worker_limit = self._scheduler.max_req_len - self._scheduler.max_req_input_len
        return int(self._scheduler.model_config.context_len - 1 - worker_limit)

    def lengthens(self, req: Any) -> bool:
        """Whether a request may get longer than the pool because it evicts."""
        state: RequestState = req.memento
        return self.config.foresee_evictions and state.config.evicts

    @property
    def automaton(self) -> EmissionAutomaton | None:
        """Follows all requests on the device; None while nobody is constrained."""
        return self._automaton if self.constrained else None

    def _constrain(self, reqs: Sequence[Any], slots: list[int], states: list[RequestState]) -> None:
        """Let the automaton follow these requests, unless nobody is constrained."""
        newly = [req for req in reqs if req.memento.config.emission != "off"]
        if not (newly or self.constrained):
            return
        if self._automaton is None:
            vocabulary = self._scheduler.model_config.vocab_size
            self._automaton = EmissionAutomaton(
                len(self.offsets), vocabulary, self.markers, self.structure, self.offsets.device
            )
        for req in reqs:
            req.memento.observe(req.output_ids)  # a retracted request's last plain tokens
        with self._between_forwards():
            if not self.constrained:
                self._automaton.reset()
            self._automaton.load(slots, states)
        self.constrained.update(newly)


def logical_lengths(reqs: Sequence[Any]) -> list[int]:
    """What SGLang's `orig_seq_lens` counts in a prefill: the whole prompt from the first chunk on,
    or everything up to the chunk's end where that is more."""
    return [max(req.extend_end + req.memento.evicted, len(req.origin_input_ids)) for req in reqs]


def _check_engine(scheduler: Any) -> None:
    if scheduler.tp_worker.model_runner.sliding_window_size is not None:
        raise ConfigError("memento does not support models with sliding-window layers yet")
    if getattr(scheduler, "is_hybrid_ssm", False):
        raise ConfigError("memento does not support models with recurrent layers yet")


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
