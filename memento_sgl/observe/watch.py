"""What metrics, traces and debug lines learn about a request, gathered as it runs.

Nothing here exists unless one of the three is asked for. What happens per token costs nothing: a
request is looked at when a marker arrives and when its row changes. Between two steps of a model
all code is cold, so markers are only put down when they arrive, and told together when their
memento closes. A `Watch` belongs to one request, its `Observers` to the scheduler process.
"""

from __future__ import annotations

import logging
import re
from operator import attrgetter
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, NamedTuple

from memento_sgl.observe.metrics import Metrics
from memento_sgl.observe.trace.build import Finished, Seen
from memento_sgl.observe.trace.writer import TraceWriter, check_folder
from memento_sgl.rule.emission import Structure, is_forced
from memento_sgl.rule.events import read_marker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memento_sgl.request.state import RequestState
    from memento_sgl.rule.config import MementoConfig
    from memento_sgl.rule.machine import Block, Eviction

logger = logging.getLogger(__name__)

TREE_COUNTS = ("pruned_nodes", "pruned_tokens", "revived_nodes", "revived_tokens")
_tree_counts = attrgetter(*TREE_COUNTS)  # a tuple; read after every step


class Observers:
    """Who wants to know, in one scheduler process.

    Args:
        metrics: None: no Prometheus metrics.
        traces: None: no trace files.
        debug: log one line per block event.
        structure: see `emission.is_forced`.
    """

    def __init__(
        self,
        metrics: Metrics | None,
        traces: TraceWriter | None,
        debug: bool,
        structure: Structure,
    ) -> None:
        self.metrics = metrics
        self.traces = traces
        self.debug = debug
        self.structure = structure
        self._saved = 0
        self._tree: tuple[int, ...] = (0,) * len(TREE_COUNTS)

    def step_evicted(self, requests: int) -> None:
        """A decode step was prepared for which this many rows were edited."""
        if self.metrics is not None:
            self.metrics.observe("evictions_per_step", requests)

    def read_tree(self, tree: Any) -> None:
        """Take over what a prunable radix tree has counted since the last call."""
        if self.metrics is None:
            return
        counts = _tree_counts(tree)
        if counts == self._tree:
            return
        for name, before, now in zip(TREE_COUNTS, self._tree, counts, strict=True):
            self.metrics.add(f"{name}_total", now - before)
        self._tree = counts

    def saved(self, change: int) -> None:
        """The rows of decoding requests miss `change` more tokens than before."""
        self._saved += change
        if self.metrics is not None and change:
            self.metrics.set("saved_kv_tokens", self._saved)


def observers_of(scheduler: Any, config: MementoConfig, structure: Structure) -> Observers | None:
    """What the launch asked for in this process; None: nothing.

    Metrics come from the ranks whose own SGLang shows, traces and debug lines from one rank of each
    tensor-parallel group.
    """
    from sglang.srt.runtime_context import get_parallel

    reporter, ps = scheduler.metrics_reporter, get_parallel()
    metrics = traces = None
    if reporter.current_scheduler_metrics_enabled:
        collector = reporter.metrics_collector
        kinds = ("counter", "gauge", "histogram")
        classes = {kind: getattr(collector, f"_{kind}_cls", None) for kind in kinds}
        metrics = Metrics(collector.labels, classes)
    leads = ps.attn_tp_rank == 0
    if leads and config.trace_dir:

        def count(outcome: str) -> None:
            if metrics is not None:
                metrics.add("traces_total", value=outcome)

        folder = check_folder(config.trace_dir)
        traces = TraceWriter(folder, config.trace_files, ps.dp_rank or 0, count)
    debug = leads and config.debug
    if metrics is None and traces is None and not debug:
        return None
    return Observers(metrics, traces, debug, structure)


class Arrived(NamedTuple):
    """A marker of the output: when it was read, and how many tokens were evicted by then."""

    at: float
    logical: int
    token: int
    evicted: int


class Watch:
    """Follows one request from its arrival in the scheduler to its end.

    Attributes:
        seen: what happened to it, in order, for its trace.
    """

    __slots__ = (
        "_counted",
        "_lost",
        "_saved",
        "_to",
        "_told",
        "_untold",
        "arrived",
        "rid",
        "seen",
        "state",
        "wall",
    )

    def __init__(self, observers: Observers, rid: str, state: RequestState) -> None:
        self._to = observers
        self.rid = rid
        self.state = state
        self.arrived = perf_counter()
        self.wall = time()
        self.seen: list[Seen] = []
        self._counted = 0  # evictions counted, so that a replay is not counted again
        self._saved = 0  # this request's part of the gauge
        self._lost = False  # retracted, not placed again yet
        self._told = state.machine.copy()  # behind the request's own by the markers in `_untold`
        self._untold: list[Arrived] = []

    def feed(self, tokens: Sequence[int], start: int) -> list[Eviction]:
        """Feed output tokens to the machine, and put markers down."""
        now, machine, evicted = perf_counter(), self.state.machine, self.state.evicted
        due = machine.feed_all(tokens, start)
        self._untold += [
            Arrived(now, index, token, evicted)
            for index, token in enumerate(tokens, start)
            if token in machine.classes
        ]
        if self._to.debug or len(machine.blocks) > len(self._told.blocks):
            self._tell()
        return due

    def _tell(self) -> None:
        """Note what the markers meant that arrived since the last call."""
        if not self._untold:
            return
        machine, config = self._told, self.state.config
        constrained, forced = config.emission != "off", 0
        for at, index, token, evicted in self._untold:
            row = index - evicted
            if constrained and is_forced(
                machine, index, config, machine.markers, self._to.structure
            ):
                self._note("forced", index, row, at)
                forced += 1
            events, _ = read_marker(machine, index, token)
            for event in events:
                self._note(event.kind, index, row, at, tokens=event.tokens)
                if event.kind == "memento_close":
                    self._block_finished(machine.blocks[-1])
        self._untold.clear()
        self._add("forced_tokens_total", forced)

    def evicted(self, eviction: Eviction, *, decoding: bool) -> None:
        """The row has just lost the span of `eviction`."""
        self._tell()
        state = self.state
        before = eviction.point - (state.evicted - eviction.tokens)
        rows = state.row(eviction.resume)
        replayed = state.applied <= self._counted
        kind = "replay" if replayed else "evict"
        if self._to.traces is not None:
            self.seen.append(Seen(perf_counter(), kind, state.applied - 1, rows, before))
        if self._to.debug:
            self._line(
                kind,
                eviction.point,
                state.row(eviction.point),
                start=eviction.start,
                end=eviction.end,
                resume=eviction.resume,
                row_start=eviction.start - (state.evicted - eviction.tokens),
                offset=state.evicted,
            )
        self._add("row_edits_total", value="decode" if decoding else "prefill")
        self._count_evictions(state.applied)
        if decoding:
            self._set_saved(state.evicted)

    def voided(self) -> None:
        """A decode result was ignored; the step is done again."""
        self._happened("void", self.state.length)
        self._add("voided_steps_total")

    def retracted(self, newest: int) -> None:
        """The request is about to lose its row, which holds everything before `newest`, its newest
        token; the state still says what was evicted from it."""
        self._happened("retract", newest)
        self._lost = True
        self._set_saved(0)

    def placed(self, known_rows: int, *, more_to_prefill: bool) -> None:
        """A prefill step for the request is about to run.

        Args:
            known_rows: rows that need no prefill.
            more_to_prefill: another step will follow.
        """
        if self._lost:
            self._lost = False
            known = known_rows + self.state.evicted
            self._happened("resume", known)
            if known:
                self._add("resumptions_total")
                self._add("resumed_tokens_total", known)
        if not more_to_prefill:
            self._set_saved(self.state.evicted)

    def finished(self, req: Any, record: Mapping[str, Any]) -> None:
        """The request has ended; `record` is its accounting."""
        self._tell()
        self._set_saved(0)
        state = self.state
        if (metrics := self._to.metrics) is not None:
            self._count_evictions(len(record["evicted_spans"]))
            given = sum(b.summary_end < state.prompt_len for b in state.machine.blocks)
            metrics.add("blocks_total", given, "prompt")
            metrics.add("recomputed_tokens_total", record["recomputed_tokens"])
            metrics.add("kv_token_steps_total", record["kv_auc"])
            metrics.add("saved_kv_token_steps_total", record["kv_auc_without"] - record["kv_auc"])
            if without := record["peak_kv_tokens_without"]:
                metrics.observe("peak_kv_ratio", record["peak_kv_tokens"] / without)
        if self._to.traces is not None:
            self._to.traces.put(self._trace(req, record))

    def _trace(self, req: Any, record: Mapping[str, Any]) -> Finished:
        stats = req.time_stats
        return Finished(
            rid=self.rid,
            wall=self.wall,
            arrived=self.arrived,
            prefill_start=stats.forward_entry_time,
            first_token=stats.prefill_finished_time,
            end=perf_counter(),
            finish=req.finished_reason.to_json()["type"],
            config=self.state.config,
            prompt_tokens=self.state.prompt_len,
            cached_tokens=req.cached_tokens,
            output_tokens=len(req.output_ids_through_stop),
            blocks=tuple(self.state.machine.blocks),
            evictions=tuple(self.state.machine.evictions),
            seen=tuple(self.seen),
            record=record,
        )

    def _happened(self, kind: str, index: int) -> None:
        """Note something other than a marker, behind the markers before it."""
        self._tell()
        self._note(kind, index, self.state.row(index), perf_counter())

    def _note(
        self, kind: str, index: int, row: int, at: float, *, tokens: int | None = None
    ) -> None:
        if self._to.traces is not None:
            self.seen.append(Seen(at, kind, index, row))
        if self._to.debug:
            self._line(kind, index, row, **({} if tokens is None else {"tokens": tokens}))

    def _line(self, kind: str, index: int, row: int, **more: int) -> None:
        fields = {"index": index, "row": row} | more
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        logger.info("memento event=%s rid=%s %s", kind, plain(self.rid), text)

    def _block_finished(self, block: Block) -> None:
        if (metrics := self._to.metrics) is None:
            return
        metrics.add("blocks_total", value="output")
        metrics.observe("block_tokens", block.block_tokens)
        metrics.observe("summary_tokens", block.summary_tokens)
        if block.summary_tokens:
            metrics.observe("compression_ratio", block.block_tokens / block.summary_tokens)

    def _count_evictions(self, total: int) -> None:
        """Count the first `total` evictions, those counted before excepted."""
        for eviction in self.state.machine.evictions[self._counted : total]:
            part = "prompt" if eviction.point < self.state.prompt_len else "output"
            self._add("evictions_total", value=part)
            self._add("evicted_tokens_total", eviction.tokens, part)
        self._counted = max(self._counted, total)

    def _set_saved(self, tokens: int) -> None:
        self._to.saved(tokens - self._saved)
        self._saved = tokens

    def _add(self, name: str, amount: int = 1, value: str = "") -> None:
        if self._to.metrics is not None:
            self._to.metrics.add(name, amount, value)


def plain(rid: str) -> str:
    """A request id that cannot break a line of `key=value` fields."""
    return rid if re.fullmatch(r"[\w.:/-]{1,128}", rid, re.ASCII) else repr(rid[:128])
