"""CPU time of metrics and traces alone, without a server: `python -m benchmarks.observe`.

Replays requests with the lengths of the paper, times a scale, through what follows a request in the
scheduler: once with nobody watching, once with Prometheus metrics (multiprocess files, as SGLang
has them) and trace files, their thread and the files included. The difference is what observing
costs, per token: to be compared with the scheduler's CPU time per token, which
`benchmarks.overhead` measures (1 / tokens per CPU second).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.traffic import Job, reasoning
from memento_sgl.config import MementoConfig, RequestOptions
from memento_sgl.demo.tokenizer import VOCABULARY, build_tokenizer
from memento_sgl.emission import NO_STRUCTURE
from memento_sgl.markers import resolve_markers
from memento_sgl.metrics import Metrics
from memento_sgl.request import RequestState
from memento_sgl.trace_writer import TraceWriter
from memento_sgl.watch import TREE_COUNTS, Observers, Watch

BATCH = 8
"""Requests per step: each step reads the tree's counts once."""
REPEAT = 20
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
MARKERS = resolve_markers(CONFIG, build_tokenizer())
LETTER = VOCABULARY.index("x")


def output_of(job: Job) -> list[int]:
    """What strict emission makes of a job."""
    opened, closed, summary, done = MARKERS[:4]
    options = job.options
    block = [opened, *[LETTER] * options["max_block_tokens"], closed]
    block += [summary, *[LETTER] * options["max_summary_tokens"], done]
    assert MARKERS.think_start is not None
    assert MARKERS.think_end is not None
    tokens = [MARKERS.think_start, *block * options["max_blocks"], MARKERS.think_end]
    return tokens + [LETTER] * max(0, job.tokens - len(tokens))


def serve(job: Job, output: list[int], number: int, observers: Observers | None) -> None:
    """One request, token by token, as the runtime handles it."""
    state = RequestState(job.ids, CONFIG, MARKERS, RequestOptions.parse(job.options))
    rid = f"{number:032x}"
    if observers is not None:
        state.watch = Watch(observers, rid, state)
        state.watch.placed(0, more_to_prefill=False)
    tree = SimpleNamespace(**dict.fromkeys(TREE_COUNTS, 0))
    marks = frozenset(MARKERS.classes)
    so_far: list[int] = []
    for index, token in enumerate(output):
        so_far.append(token)
        if observers is not None and index % BATCH == 0:
            observers.read_tree(tree)
        if token not in marks or not state.observe(so_far):
            continue
        eviction = state.apply()
        if observers is not None and state.watch is not None:
            state.watch.evicted(eviction, decoding=True)
            state.watch.voided()
            observers.step_evicted(1)
    record = state.report(so_far)
    if state.watch is not None:
        state.watch.finished(_ended(so_far, state.watch.arrived), record)


def _ended(output: list[int], started: float) -> Any:
    """The part of SGLang's request that a trace reads."""
    return SimpleNamespace(
        time_stats=SimpleNamespace(forward_entry_time=started, prefill_finished_time=started),
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "length"}),
        cached_tokens=0,
        output_ids_through_stop=output,
    )


def seconds(jobs: list[Job], observers: Observers | None) -> float:
    """CPU seconds of this process for all jobs, REPEAT times; waits for the trace files."""
    outputs = [output_of(job) for job in jobs]
    started = time.process_time()
    for number in range(REPEAT):
        for job, output in zip(jobs, outputs, strict=True):
            serve(job, output, number, observers)
        if observers is not None and observers.traces is not None:
            observers.traces.drain()
    return time.process_time() - started


def main() -> None:
    table = Table(title="CPU time of metrics and traces", title_justify="left")
    for column in ("lengths", "tokens", "blocks", "us per request", "us per block", "us per token"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = name
        folder = Path(name) / "traces"
        folder.mkdir()
        metrics = Metrics({"model_name": "m", "tp_rank": 0}, {})
        writer = TraceWriter(folder, 1000, 0, lambda _: None)
        observers = Observers(metrics, writer, False, NO_STRUCTURE)
        for scale in (0.05, 0.1, 1.0):
            jobs = reasoning(8, scale, seed=3)
            seconds(jobs, observers)  # warm
            extra = (seconds(jobs, observers) - seconds(jobs, None)) / REPEAT
            tokens = sum(len(output_of(job)) for job in jobs)
            blocks = sum(job.options["max_blocks"] for job in jobs)
            table.add_row(
                f"paper's x {scale}",
                str(tokens),
                str(blocks),
                *(f"{1e6 * extra / n:.2f}" for n in (len(jobs), blocks, tokens)),
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
