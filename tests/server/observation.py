"""What a server says about its own run in several places, to be compared."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from conftest import Job, Served
from prometheus_client.parser import text_string_to_metric_families

from memento_sgl.observe.metrics import PREFIX
from memento_sgl.observe.trace.schema import RequestTrace, read_trace
from memento_sgl.rule.machine import BlockMachine

Figures = dict[str, float]


def observed(folder: Path) -> tuple[str, ...]:
    """Flags of a server with metrics and traces."""
    return "--enable-metrics", "--memento-trace-dir", str(folder)


class Run(NamedTuple):
    """A mix of requests and everything that was said about it."""

    jobs: list[Job]
    answers: list[dict[str, Any]]
    records: list[dict[str, Any]]  # of those with memento enabled, like the next two
    machines: list[BlockMachine]
    traces: list[RequestTrace]
    change: Figures

    def total(self, key: Callable[[dict[str, Any]], int]) -> int:
        return sum(map(key, self.records))

    def changed(self, name: str, value: str = "") -> float:
        """By how much a metric of ours rose; `value`: of its additional label."""
        return self.change[f"{PREFIX}{name}{value and ':' + value}"]

    def copies(self) -> list[dict[str, Any]]:
        """Answers that `Served.verify` may take apart."""
        copies = [answer | {"meta_info": {**answer["meta_info"]}} for answer in self.answers]
        for answer in copies:
            if (record := answer["meta_info"].get("memento")) is not None:
                answer["meta_info"]["memento"] = dict(record)
        return copies


def scrape(server: Served) -> Figures:
    """Every sample of `/metrics`, by name and the value of a label of ours."""
    text = httpx.get(f"{server.url}/metrics", follow_redirects=True, timeout=60).text
    found: Figures = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = [
                sample.labels[label]
                for label in ("part", "step", "outcome")
                if label in sample.labels
            ]
            if "le" not in sample.labels:
                name = sample.name + "".join(f":{value}" for value in own)
                found[name] = found.get(name, 0.0) + sample.value
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """The thread that writes traces is not waited for by the answers."""
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within half a minute")


def observe(
    server: Served, folder: Path, generate: Callable[[], tuple[list[Job], list[Any]]]
) -> Run:
    """Everything that was said about the requests which `generate` sends.

    Args:
        folder: where the server writes trace files.
        generate: returns the jobs and their answers.
    """
    written = f"{PREFIX}traces_total:written"
    before = scrape(server)
    known = set(folder.glob("*.json"))
    jobs, answers = generate()
    kept = [i for i, (_, _, options) in enumerate(jobs) if options.get("enable", True)]
    wait_for(lambda: scrape(server)[written] - before[written] == len(kept))
    after = scrape(server)
    traces = [read_trace(path) for path in sorted(set(folder.glob("*.json")) - known)]
    by_id = {trace.id: trace for trace in traces}
    assert len(by_id) == len(traces) == len(kept)
    return Run(
        jobs=jobs,
        answers=answers,
        records=[answers[i]["meta_info"]["memento"] for i in kept],
        machines=[server.machine(jobs[i][0], answers[i]["output_ids"], **jobs[i][2]) for i in kept],
        traces=[by_id[answers[i]["meta_info"]["id"]] for i in kept],
        change={name: value - before.get(name, 0.0) for name, value in after.items()},
    )


def verify_observed(server: Served, folder: Path, jobs: list[Job], concurrency: int) -> Run:
    """Run jobs; Prometheus, traces, accounting and the oracle have to agree."""
    run = observe(server, folder, lambda: (jobs, server.generate_many(jobs, concurrency)))
    verify_counters(run)
    verify_row_edits(run)
    verify_traces(run)
    assert server.verify_all(run.jobs, run.copies()) > 5
    return run


def verify_counters(run: Run) -> None:
    """Counters are the sums of the records."""
    sums = {
        "blocks_total": run.total(lambda r: r["blocks"]),
        "evictions_total": run.total(lambda r: len(r["evicted_spans"])),
        "evicted_tokens_total": run.total(lambda r: r["evicted_tokens"]),
    }
    for name, expected in sums.items():
        assert run.changed(name, "prompt") + run.changed(name, "output") == expected, name
    assert run.changed("kv_token_steps_total") == run.total(lambda r: r["kv_auc"])
    saved = run.total(lambda r: r["kv_auc_without"] - r["kv_auc"])
    assert run.changed("saved_kv_token_steps_total") == saved
    recomputed = run.total(lambda r: r["recomputed_tokens"])
    assert run.changed("recomputed_tokens_total") == recomputed


def verify_row_edits(run: Run) -> None:
    """Row edits, voided steps and retractions are those in the traces."""
    edits = run.changed("row_edits_total", "prefill") + run.changed("row_edits_total", "decode")
    applied = sum(e.time is not None for trace in run.traces for e in trace.evictions)
    counts: Counter[str] = sum((Counter(trace.counts) for trace in run.traces), Counter())
    assert edits == applied + counts["replay"]
    assert run.changed("evictions_per_step_sum") == run.changed("row_edits_total", "decode")
    assert run.changed("voided_steps_total") == counts["void"]
    infos = [answer["meta_info"] for answer in run.answers]
    assert counts["retract"] == sum(i["num_retractions"] for i in infos if "memento" in i)
    resumed = [e for t in run.traces for e in t.events if e.kind == "resume" and e.index]
    assert run.changed("resumptions_total") == len(resumed)
    assert run.changed("resumed_tokens_total") == sum(event.index for event in resumed)


def verify_traces(run: Run) -> None:
    """Traces hold what the records and the machine say."""
    for trace, record, machine in zip(run.traces, run.records, run.machines, strict=True):
        assert trace.accounting == {k: v for k, v in record.items() if isinstance(v, int)}
        assert [(e.start, e.end) for e in trace.evictions] == [
            tuple(s) for s in record["evicted_spans"]
        ]
        assert [e.point for e in trace.evictions] == record["eviction_points"]
        assert [
            (b.start, b.end, b.summary_start, b.summary_end) for b in trace.blocks
        ] == machine.blocks
        assert trace.tokens.blocks == sum(record["block_tokens"])
        assert trace.tokens.mementos == sum(record["summary_tokens"])
        assert trace.counts["cached_evictions"] == sum(e.time is None for e in trace.evictions)
