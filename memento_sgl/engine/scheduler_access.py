"""What is read of SGLang's scheduler, and what it is asked to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from memento_sgl.engine.staging import staged
from memento_sgl.errors import ConfigError

logger = logging.getLogger(__name__)


class SchedulerAccess:
    """This process's scheduler, once it has been built."""

    def __init__(self) -> None:
        self._scheduler: Any = None

    def attach(self, scheduler: Any) -> None:
        """Bind to the scheduler once its pools exist.

        Raises:
            ConfigError: the engine settled on something that eviction does not support.
        """
        _check_engine(scheduler)
        self._scheduler = scheduler
        if scheduler.page_size > 1:
            # The default copy kernel exists for speculative decoding only, and does not allow for
            # targets that overlap sources.
            scheduler.token_to_kv_pool_allocator.get_kvcache().use_native_move_kv_cache = True

    @property
    def table(self) -> torch.Tensor:
        """Slots of every request's rows; int32 `[request slots, rows]`."""
        table: torch.Tensor = self._scheduler.req_to_token_pool.req_to_token
        return table

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return int(self._scheduler.model_config.vocab_size)

    @property
    def pool_size(self) -> int:
        """KV slots of this server."""
        return int(self._scheduler.max_total_num_tokens)

    @property
    def longest_prompt(self) -> int:
        """Prompts of this many tokens are refused whatever they evict; SGLang's own margin."""
        worker_limit = self._scheduler.max_req_len - self._scheduler.max_req_input_len
        return int(self._scheduler.model_config.context_len - 1 - worker_limit)

    @property
    def waiting(self) -> list[Any]:
        """SGLang's waiting queue."""
        queue: list[Any] = self._scheduler.waiting_queue
        return queue

    @property
    def overlap(self) -> bool:
        """A step is prepared while the one before it runs."""
        return bool(self._scheduler.enable_overlap)

    def in_flight(self, req: Any) -> bool:
        """Whether a step runs, or has run, whose result was not processed yet."""
        queue = getattr(self._scheduler, "result_queue", ())
        return any(req in launched.reqs for launched, _ in queue)

    def abort(self, req: Any, reason: str) -> None:
        """End a request that has no row and cannot get one; its output so far goes out."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        logger.warning("%s (rid=%s)", reason, req.rid)
        req.memento.error = reason
        req.to_finish = None
        req.finished_reason = FINISH_ABORT(reason)
        self._scheduler.output_streamer.stream_output([req], req.return_logprob)

    def between_forwards(self) -> Any:
        """Device work inside happens after the step in flight has written the tokens and states
        of its slots, before the next step reads them. Without overlap scheduling forward passes
        run on the current stream."""
        return self._scheduler.forward_stream_ctx if self.overlap else nullcontext()

    def set_inputs(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Put tokens where the next decode step looks for its input; `between_forwards` only."""
        buffer = self._scheduler.future_map.output_tokens_buf
        where, what = staged([slots, tokens], buffer.device)
        buffer[where] = what.to(buffer.dtype)

    def move_kv(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy the KV of slots `source` to slots `target`, int64 `[N]` each, which may overlap.

        After the step in flight, which still reads both where they are, before the next one.
        """
        streams = self._scheduler.device_module
        made_on = streams.current_stream()
        with self.between_forwards():
            copied_on = streams.current_stream()
            copied_on.wait_stream(made_on)
            self._scheduler.token_to_kv_pool_allocator.get_kvcache().move_kv_cache(target, source)
        for slots in (target, source):
            if slots.is_cuda:  # not to be reused on `made_on` before the copy has read them
                slots.record_stream(copied_on)


def _check_engine(scheduler: Any) -> None:
    if scheduler.tp_worker.model_runner.sliding_window_size is not None:
        raise ConfigError("memento does not support models with sliding-window layers yet")
    if getattr(scheduler, "is_hybrid_ssm", False):
        raise ConfigError("memento does not support models with recurrent layers yet")
