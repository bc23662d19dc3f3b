"""Events to Prometheus metrics."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from memento_sgl.observe.sink import Event, Sink

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memento_sgl.observe.metrics import Metrics
    from memento_sgl.observe.watch import Watch
    from memento_sgl.rule.machine import Block

TREE_COUNTS = ("pruned_nodes", "pruned_tokens", "revived_nodes", "revived_tokens")
_tree_counts = attrgetter(*TREE_COUNTS)  # a tuple; read after every step


class MetricsSink(Sink):
    """Keeps the metrics of one scheduler process."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._saved = 0
        self._tree: tuple[int, ...] = (0,) * len(TREE_COUNTS)

    def follow(self, watch: Watch) -> RequestMetrics:
        return RequestMetrics(self, watch)

    def step_evicted(self, requests: int) -> None:
        self.metrics.observe("evictions_per_step", requests)

    def read_tree(self, tree: Any) -> None:
        counts = _tree_counts(tree)
        if counts == self._tree:
            return
        for name, before, now in zip(TREE_COUNTS, self._tree, counts, strict=True):
            self.metrics.add(f"{name}_total", now - before)
        self._tree = counts

    def saved(self, change: int) -> None:
        """The rows of decoding requests miss `change` more tokens than before."""
        self._saved += change
        if change:
            self.metrics.set("saved_kv_tokens", self._saved)


class RequestMetrics:
    """What one request adds to them."""

    __slots__ = ("_counted", "_saved", "_state", "_to")

    def __init__(self, sink: MetricsSink, watch: Watch) -> None:
        self._to = sink
        self._state = watch.state
        self._counted = 0  # evictions, each once
        self._saved = 0  # this request's part of the gauge

    def event(self, event: Event) -> None:
        add, state = self._to.metrics.add, self._state
        match event.kind:
            case "memento_close" if event.block is not None:
                self._block_finished(event.block)
            case "forced":
                add("forced_tokens_total")
            case "evict" | "replay":
                add("row_edits_total", value="decode" if event.decoding else "prefill")
                self._count_evictions(state.applied)
                if event.decoding:
                    self._set_saved(state.evicted)
            case "void":
                add("voided_steps_total")
            case "retract":
                self._set_saved(0)
            case "resume" if event.logical:
                add("resumptions_total")
                add("resumed_tokens_total", event.logical)
            case "place":
                self._set_saved(state.evicted)

    def finished(self, _req: Any, record: Mapping[str, Any]) -> None:
        metrics, state = self._to.metrics, self._state
        self._set_saved(0)
        self._count_evictions(len(record["evicted_spans"]))
        given = sum(b.summary_end < state.prompt_len for b in state.machine.blocks)
        metrics.add("blocks_total", given, "prompt")
        metrics.add("recomputed_tokens_total", record["recomputed_tokens"])
        metrics.add("kv_token_steps_total", record["kv_auc"])
        metrics.add("saved_kv_token_steps_total", record["kv_auc_without"] - record["kv_auc"])
        if without := record["peak_kv_tokens_without"]:
            metrics.observe("peak_kv_ratio", record["peak_kv_tokens"] / without)

    def _block_finished(self, block: Block) -> None:
        metrics = self._to.metrics
        metrics.add("blocks_total", value="output")
        metrics.observe("block_tokens", block.block_tokens)
        metrics.observe("summary_tokens", block.summary_tokens)
        if block.summary_tokens:
            metrics.observe("compression_ratio", block.block_tokens / block.summary_tokens)

    def _count_evictions(self, total: int) -> None:
        """Count the first `total` evictions, those counted before excepted."""
        for eviction in self._state.machine.evictions[self._counted : total]:
            part = "prompt" if eviction.point < self._state.prompt_len else "output"
            self._to.metrics.add("evictions_total", value=part)
            self._to.metrics.add("evicted_tokens_total", eviction.tokens, part)
        self._counted = max(self._counted, total)

    def _set_saved(self, tokens: int) -> None:
        self._to.saved(tokens - self._saved)
        self._saved = tokens
