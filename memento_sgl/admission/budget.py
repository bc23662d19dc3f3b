"""From SGLang's requests to what admission foresees of them, and back into its budget.

SGLang's budget is `free and evictable slots - memory_budget.total_offset`; a request comes in if
its own reservation stays below that. Both figures are replaced by those of `admission`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memento_sgl.admission.forecast import BlockStats, Estimate, Forecast, Retry, tokens_ahead
from memento_sgl.admission.pacing import Pacing

if TYPE_CHECKING:
    from memento_sgl.request.state import RequestState
    from memento_sgl.rule.config import MementoConfig

MARKERS_PER_BLOCK = 4


class Admission:
    """What one scheduler process knows about who may come in.

    Attributes:
        foresees: evictions count; else SGLang's own reservation does.
        block_stats: what finished blocks were like.
        retry: when an eviction may let another request in.
        pacing: lets decode steps run between the segments of a prompt.
        forecast: what running and admitted requests will hold, while a prefill batch is put
            together; None when SGLang's own reservation counts.
    """

    def __init__(self, config: MementoConfig) -> None:
        self.foresees = config.foresee_evictions
        self.block_stats = BlockStats()
        self.retry = Retry()
        self.pacing = Pacing()
        self.forecast: Forecast | None = None
        self._delimiters = 2 if config.mask_delimiters or config.restart_mode else 0

    def learn(self, state: RequestState, since: int) -> None:
        """A block of a request has closed; `since`: where it had been open since."""
        gone = state.machine.blocks[-1].block_tokens + self._delimiters
        self.block_stats.learn(state.open_since - since, gone)

    def ask_again(self) -> bool:
        """Whether the evictions that were just made are a reason to look at who waits."""
        return self.foresees and self.retry.due(self.block_stats.count)

    def may_exceed_pool(self, req: Any) -> bool:
        """Whether a request may get longer than the pool because it evicts."""
        state: RequestState = req.memento
        return self.foresees and state.config.evicts

    def estimate_running(self, adder: Any) -> None:
        """Foresee what runs and what this batch has taken in so far."""
        estimates = [self._estimate(r, adder.new_token_ratio) for r in unfinished(adder)]
        estimates += [self.estimate_waiting(r, adder.page_size) for r in adder.can_run_list]
        self.forecast = Forecast(estimates, self.block_stats.deviation)
        adder.memory_budget.total_offset = self.forecast.peak

    def estimate_waiting(self, req: Any, page: int) -> Estimate:
        """A request that has its prompt to be read yet, or the rest of it. SGLang counts a page
        more for each request, and so does this. The page in which a match ends is not there yet:
        the request takes a copy of its beginning."""
        rows, memento = req.prefix_len, req.memento
        if not req.kv.holds_kv:
            rows -= rows % page
        length = len(req.origin_input_ids) + len(req.output_ids)
        if req.to_finish is not None:  # refused: SGLang has put another prompt in place
            need = peak = length
        else:
            need, peak = memento.rows_replayed(length), memento.peak_rows(length)
        estimate = self._estimate(req, 1.0)
        return estimate._replace(
            need=need - rows + page,
            peak_need=peak - rows + page,
            frees=None if estimate.frees is None else need - rows + page,
        )

    def _estimate(self, req: Any, ratio: float) -> Estimate:
        left = _tokens_left(req)
        expected = _clip(left) * ratio
        cycle, gone = self._block_cycle(req.memento)
        if not cycle:
            return Estimate(expected)
        opened = len(req.origin_input_ids) + len(req.output_ids) - req.memento.open_since
        certain = req.sampling_params.ignore_eos
        return Estimate(
            ahead=tokens_ahead(left, expected, cycle=cycle, opened=opened, certain=certain),
            cycle=cycle,
            gone=gone,
            opened=opened,
            kept=req.memento.blocks_kept,
            frees=req.kv.kv_committed_len - req.kv.cache_protected_len if certain else None,
        )

    def _block_cycle(self, state: RequestState) -> tuple[float, float]:
        """Tokens from memento to memento, and how many of them go, as expected of a request; the
        caps stand in until a block was seen. Zero: its evictions cannot be foreseen."""
        config = state.config
        if not config.evicts:
            return 0.0, 0.0
        block, memento = config.max_block_tokens, config.max_summary_tokens
        if not self.block_stats.count and block and memento:
            return block + memento + MARKERS_PER_BLOCK, block
        return self.block_stats.cycle, self.block_stats.gone


def unfinished(adder: Any) -> list[Any]:
    """What runs; SGLang takes finished requests out only later."""
    running = adder.running_batch
    return [req for req in running.reqs if not req.finished()] if running is not None else []


def _tokens_left(req: Any) -> int:
    return max(int(req.sampling_params.max_new_tokens) - len(req.output_ids), 0)


def _clip(tokens: int) -> int:
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    return min(tokens, int(CLIP_MAX_NEW_TOKENS))


def stock_reservation(adder: Any, req: Any) -> int:
    """What `PrefillAdder.add_one_req` itself would reserve."""
    rest = len(req.full_untruncated_fill_ids) - req.prefix_len
    return int(rest + _clip(_tokens_left(req)) + adder.per_req_token_overhead)
