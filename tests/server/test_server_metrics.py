"""One run, four accounts of it: Prometheus, `meta_info`, trace files and the oracle agree.

Retraction is forced: what a request does again must not be counted twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import STRICT, Job, Served, random_jobs, request_body
from dashboard import queried
from observation import (
    Run,
    observe,
    observed,
    scrape,
    verify_counters,
    verify_row_edits,
    verify_traces,
    wait_for,
)
from prometheus_client.parser import text_string_to_metric_families

from memento_sgl.demo.server import serve_command
from memento_sgl.observe.metrics import METRICS, PREFIX
from memento_sgl.observe.trace.schema import MAX_BYTES, read_trace
from memento_sgl.rule.emission import permitted
from memento_sgl.rule.machine import Block, BlockMachine, section_start_of

pytestmark = pytest.mark.server

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"enable": False},
    {"keep_last_n_blocks": 1},
    {"keep_last_n_blocks": -1},
    {"keep_last_block_for_answer": True},
    {"max_block_tokens": 6, "max_summary_tokens": 3},
    STRICT,
    STRICT | {"max_blocks": 0, "min_summary_tokens": 2, "max_summary_tokens": 2},
)
HOSTILE = '../../x y\n"<b>memento event=evict'


def launcher(folder: Path) -> Callable[..., list[str]]:
    def command(model: str, *flags: str) -> list[str]:
        more = (*observed(folder), "--memento-debug", "true")
        return serve_command(model, *flags, *more, "--log-level", "info")

    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "made" / "by the server"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served], folder: Path) -> Served:
    return serve(
        "metrics",
        "qwen3",
        "--chunked-prefill-size",
        "48",
        environment={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"},
        launcher=launcher(folder),
    )


def finished_text(server: Served) -> tuple[list[int], int]:
    """A text with several finished blocks, and where its prompt ended."""
    for seed in range(11, 60):
        ids = random_jobs(1, seed=seed)[0][0]
        answer = server.generate(ids, 300)
        if len(server.machine(ids, answer["output_ids"]).blocks) >= 4:
            return ids + answer["output_ids"], len(ids)
    raise AssertionError("no output with four blocks")


@pytest.fixture(scope="module")
def run(server: Served, folder: Path) -> Run:
    text, start = finished_text(server)
    jobs = random_jobs(16, 5, *OPTIONS, longest=200)
    jobs += [(text, 40, {"assistant_start": start})] * 2
    jobs += [(text[:-30], 40, {"assistant_start": start, "keep_last_n_blocks": 1})]

    def generate() -> tuple[list[Job], list[Any]]:
        answers = server.generate_many(jobs, concurrency=8)
        # SGLang retracts the shortest output: beside a long one, the others, once they evicted too.
        pairs = [(text[:start], 500, {"enable": False}), *random_jobs(4, 6)]
        return jobs + pairs, answers + server.generate_many(pairs, concurrency=2)

    return observe(server, folder, generate)


def test_every_metric_is_exposed(run: Run) -> None:
    ends = {"counter": "", "gauge": "", "histogram": "_count"}
    for name, spec in METRICS.items():
        values = spec.label[1] if spec.label else ("",)
        for value in values:
            assert run.changed(name + ends[spec.kind], value) >= 0


def test_the_dashboard_asks_for_what_is_exposed(server: Served, run: Run) -> None:
    text = httpx.get(f"{server.url}/metrics", follow_redirects=True, timeout=60).text
    exposed = {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert queried() - exposed == set()
    assert len(queried()) > len(METRICS)


def test_the_run_is_worth_comparing(server: Served, run: Run) -> None:
    assert run.change["sglang:num_retracted_requests_total"] > 3
    assert any(
        event.kind == "retract"
        and any(e.time is not None and e.time < event.time for e in t.evictions)
        for t in run.traces
        for event in t.events
    )
    assert run.total(lambda r: len(r["evicted_spans"])) > 20
    assert run.changed("forced_tokens_total") > 20
    assert run.changed("resumptions_total") > 3
    assert run.changed("evictions_total", "prompt") > 3


def test_tokens_and_records_are_those_of_the_oracle(server: Served, run: Run) -> None:
    assert server.verify_all(run.jobs, run.copies()) > 20


def test_all_accounts_agree(run: Run) -> None:
    verify_counters(run)
    verify_row_edits(run)
    verify_traces(run)
    assert run.changed("voided_steps_total") > 0
    assert run.changed("evictions_per_step_sum") > 0
    assert run.changed("recomputed_tokens_total") == 0


def test_histograms_are_of_what_was_generated(run: Run) -> None:
    blocks = [
        block
        for trace, machine in zip(run.traces, run.machines, strict=True)
        for block in machine.blocks
        if block.summary_end >= trace.tokens.prompt
    ]
    assert run.changed("blocks_total", "output") == len(blocks)
    for name, key in (
        ("block_tokens", Block.block_tokens),
        ("summary_tokens", Block.summary_tokens),
    ):
        assert run.changed(f"{name}_count") == len(blocks)
        assert run.changed(f"{name}_sum") == sum(key.fget(block) for block in blocks)
    ratios = [b.block_tokens / b.summary_tokens for b in blocks if b.summary_tokens]
    assert run.changed("compression_ratio_count") == len(ratios)
    assert run.changed("compression_ratio_sum") == pytest.approx(sum(ratios))
    shares = [r["peak_kv_tokens"] / r["peak_kv_tokens_without"] for r in run.records]
    assert run.changed("peak_kv_ratio_count") == len(shares)
    assert run.changed("peak_kv_ratio_sum") == pytest.approx(sum(shares))


def test_the_tree_prunes_what_requests_evicted(run: Run) -> None:
    assert 0 < run.changed("pruned_nodes_total") <= run.changed("pruned_tokens_total")
    assert run.changed("revived_nodes_total") <= run.changed("revived_tokens_total")


def test_forced_tokens_are_those_with_one_possibility(server: Served, run: Run) -> None:
    """Counted the slow way: at every output position."""
    expected = 0
    for (ids, _, options), answer in zip(run.jobs, run.answers, strict=True):
        config = server.merged(options)
        if config.emission == "off":
            continue
        markers = server.markers
        start = section_start_of(ids, config, markers, options.get("assistant_start"))
        machine = BlockMachine(markers, config, section_start=start)
        machine.feed_all(ids)
        for index, token in enumerate(answer["output_ids"], len(ids)):
            allowed = permitted(machine, index, config, markers, server.structure)
            expected += not allowed.text and len(allowed.special) == 1
            machine.feed(index, token)
    assert run.changed("forced_tokens_total") == expected
    assert sum(trace.counts.get("forced", 0) for trace in run.traces) == expected


def test_traces_tell_times_in_order(run: Run) -> None:
    for trace in run.traces:
        times = trace.times
        assert times.prefill_start is not None
        assert times.first_token is not None
        assert 0 <= times.prefill_start <= times.first_token <= times.end
        for block in trace.blocks:
            marks = (block.opened, block.closed, block.summary_opened, block.summary_closed)
            known = [mark for mark in marks if mark is not None]
            assert known == sorted(known)
            in_output = block.summary_end >= trace.tokens.prompt
            assert (block.summary_closed is not None) is in_output
            assert all(times.first_token <= mark <= times.end for mark in known)
        assert [point[0] for point in trace.kv] == sorted(point[0] for point in trace.kv)
        assert trace.kv[-1] == (times.end, trace.accounting["final_kv_tokens"])


def test_the_curve_is_the_closed_form(run: Run) -> None:
    """Nobody held more than the accounting says; who was computed from scratch reached it."""
    reached = 0
    for trace in run.traces:
        peak = max(tokens for _, tokens in trace.kv)
        assert peak <= trace.accounting["peak_kv_tokens"]
        if trace.counts["cached_evictions"] == 0 and not trace.counts.get("retract"):
            assert peak == trace.accounting["peak_kv_tokens"]
            reached += 1
        gone = 0
        for eviction in trace.evictions:
            if eviction.time is not None:
                assert eviction.rows_before == eviction.point - gone
                assert eviction.rows_after == eviction.resume - gone - (
                    eviction.end - eviction.start
                )
            gone += eviction.end - eviction.start
    assert reached > 3


def test_debug_lines_tell_every_event(server: Served, run: Run) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "memento event=" in line]
    for trace in run.traces:
        own = [line for line in lines if f" rid={trace.id} " in line]
        kinds = Counter(re.findall(r"memento event=(\w+)", "\n".join(own)))
        for kind in ("void", "retract", "resume", "replay", "abandon", "forced"):
            assert kinds[kind] == trace.counts.get(kind, 0), kind
        assert kinds["evict"] == len(trace.evictions) - trace.counts["cached_evictions"]
        for eviction in trace.evictions:
            if eviction.time is not None:
                place = f"start={eviction.start} end={eviction.end} resume={eviction.resume} "
                assert any(f"index={eviction.point} " in line and place in line for line in own)
        assert kinds["memento_close"] == sum(b.summary_closed is not None for b in trace.blocks)
        assert all(re.search(r" index=\d+ row=\d+", line) for line in own)


def test_a_hostile_request_id_stays_inside_the_folder(server: Served, folder: Path) -> None:
    ids = random_jobs(1, seed=5)[0][0]
    answer = server.post("/generate", **request_body(ids, 60) | {"rid": HOSTILE}).json()
    assert answer["meta_info"]["id"] == HOSTILE
    wait_for(lambda: any(read_trace(path).id == HOSTILE for path in folder.glob("*.json")))
    outside = [path for path in folder.parent.parent.rglob("*") if path.is_file()]
    assert all(path.parent == folder and path.suffix == ".json" for path in outside)
    assert all(path.stat().st_size <= MAX_BYTES for path in outside)
    assert '"<b>memento event=evict' not in "".join(
        line for line in server.log.read_text().splitlines() if line.startswith('"')
    )


def test_health_checks_leave_nothing(server: Served, folder: Path) -> None:
    before = scrape(server)[f"{PREFIX}peak_kv_ratio_count"], len(list(folder.iterdir()))
    assert httpx.get(f"{server.url}/health_generate", timeout=120).status_code == 200
    server.assert_all_slots_free()
    assert before == (scrape(server)[f"{PREFIX}peak_kv_ratio_count"], len(list(folder.iterdir())))


def test_the_gauge_is_zero_when_nothing_runs(server: Served, folder: Path) -> None:
    """Also after clients have gone away; their requests leave a trace that says so."""
    for ids, _, _ in random_jobs(3, seed=31):
        body = request_body(ids, 2000) | {"stream": True}
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as response,
        ):
            for i, _ in enumerate(response.iter_lines()):
                if i > 60:
                    break

    def ended() -> bool:
        finishes = [read_trace(path).finish for path in folder.glob("*.json")]
        return finishes.count("abort") == 3

    wait_for(ended)
    server.assert_all_slots_free()
    assert scrape(server)[f"{PREFIX}saved_kv_tokens"] == 0
