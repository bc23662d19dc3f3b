"""Who wants to know, in one scheduler process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memento_sgl.observe.debug_lines import DebugSink
from memento_sgl.observe.metrics import Metrics
from memento_sgl.observe.metrics_sink import MetricsSink
from memento_sgl.observe.sink import Sink
from memento_sgl.observe.trace.entries import TraceSink
from memento_sgl.observe.trace.writer import TraceWriter, check_folder

if TYPE_CHECKING:
    from memento_sgl.rule.config import MementoConfig
    from memento_sgl.rule.emission import Structure


class Observers:
    """The sinks of one scheduler process.

    Args:
        sinks: at least one.
        structure: see `emission.is_forced`.
    """

    def __init__(self, sinks: Sequence[Sink], structure: Structure) -> None:
        self.sinks = sinks
        self.structure = structure
        self.at_once = any(sink.at_once for sink in sinks)

    def step_evicted(self, requests: int) -> None:
        """A decode step was prepared for which this many rows were edited."""
        for sink in self.sinks:
            sink.step_evicted(requests)

    def read_tree(self, tree: Any) -> None:
        """A result was processed: our radix tree has counted what it did."""
        for sink in self.sinks:
            sink.read_tree(tree)


def observers_of(scheduler: Any, config: MementoConfig, structure: Structure) -> Observers | None:
    """What the launch asked for in this process; None: nothing.

    Metrics come from the ranks whose own SGLang shows, traces and debug lines from one rank of each
    tensor-parallel group.
    """
    from sglang.srt.runtime_context import get_parallel

    reporter, ps = scheduler.metrics_reporter, get_parallel()
    sinks: list[Sink] = []
    metrics: Metrics | None = None
    if reporter.current_scheduler_metrics_enabled:
        collector = reporter.metrics_collector
        kinds = ("counter", "gauge", "histogram")
        classes = {kind: getattr(collector, f"_{kind}_cls", None) for kind in kinds}
        metrics = Metrics(collector.labels, classes)
        sinks.append(MetricsSink(metrics))
    leads = ps.attn_tp_rank == 0
    if leads and config.trace_dir:

        def count(outcome: str) -> None:
            if metrics is not None:
                metrics.add("traces_total", value=outcome)

        folder = check_folder(config.trace_dir)
        sinks.append(TraceSink(TraceWriter(folder, config.trace_files, ps.dp_rank or 0, count)))
    if leads and config.debug:
        sinks.append(DebugSink())
    return Observers(sinks, structure) if sinks else None
