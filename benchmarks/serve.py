"""Stock SGLang and memento side by side: `python -m benchmarks.serve`.

What memento costs where it wins nothing is finer than this: see `benchmarks.overhead`.
All servers of a group run at once and take turns, in changing order, so that a noisy machine hurts
all. A ratio of speeds is the median over rounds of the ratio within one round. Same prompts and the
same number of tokens for each (`ignore_eos`), weights at random; memento forces blocks and mementos
with strict emission. Absolute figures of a CPU mean nothing: read the ratios.

    python -m benchmarks.serve --only pressured --rounds 5
    python -m benchmarks.serve --size gpu --model qwen3-8b -- --attention-backend triton
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import plotext
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.load import Outcome, measure
from benchmarks.scenarios import SIZES, Scenario, large_pool, longer, small_pool
from benchmarks.shapes import SHAPES, write_model
from memento_sgl.demo.server import running_server
from memento_sgl.environment import has_accelerator

# SGLang halves float32 configurations to float16, which a CPU computes far more slowly.
CPU_FLAGS = ("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32")
COMMON = ("--load-format", "dummy", "--log-level-http", "warning", "--decode-log-interval", "4")
console = Console(width=150)


def commands(model: Path, pool: int, flags: list[str], traces: Path) -> dict[str, list[str]]:
    """Command line of each kind of server; the same SGLang flags for all."""
    common = ["--model-path", str(model), *(() if has_accelerator() else CPU_FLAGS), *COMMON]
    common += ["--max-total-tokens", str(pool), "--max-running-requests", "256", *flags]
    base = [sys.executable, "-m", "sglang.launch_server", *common]
    observed = [*common, "--enable-memento", "--enable-metrics", "--memento-trace-dir", str(traces)]
    return {
        "stock": base,
        "stock-exact": [*base, "--disable-radix-cache"],
        "memento": [*base, "--enable-memento"],
        "observed": [*base[:3], *observed],
        "observing": [sys.executable, "-m", "benchmarks.observing", *observed],
    }


def run_group(
    scenarios: list[Scenario], model: Path, flags: list[str], rounds: int | None
) -> Iterator[dict[str, Any]]:
    """Measure scenarios that share one pool size; one dict for each, ready for JSON."""
    needed = {variant.server for scenario in scenarios for variant in scenario.variants}
    (pool,) = {scenario.pool for scenario in scenarios}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        urls = {}
        for server, command in commands(model, pool, flags, folder / "traces").items():
            if server in needed:
                with console.status(f"starting {server}, pool of {pool} tokens"):
                    log = folder / f"{server}.log"
                    urls[server] = stack.enter_context(running_server(command, log, timeout=600))
        for scenario in scenarios:
            outcomes: dict[str, list[Outcome]] = {v.name: [] for v in scenario.variants}
            first = 0 if scenario.warm_up else 1
            for number in range(first, (rounds or scenario.rounds) + 1):
                for variant in scenario.variants[:: 1 if number % 2 else -1]:
                    label = f"{scenario.name}, {variant.name}, round {number}"
                    with console.status(label):
                        found = measure(
                            urls[variant.server],
                            folder / f"{variant.server}.log",
                            variant.jobs(scenario.jobs),
                            scenario.concurrency,
                            memento=not variant.server.startswith("stock"),
                        )
                    if number:
                        outcomes[variant.name].append(found)
            yield summarise(scenario, outcomes)


def summarise(scenario: Scenario, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    variants = {}
    speeds = {name: [o.speed for o in rounds] for name, rounds in outcomes.items()}
    base = next(iter(speeds.values()))
    for name, rounds in outcomes.items():
        latencies = sorted(t for outcome in rounds for t in outcome.latencies)
        records = [record for outcome in rounds for record in outcome.records]
        variants[name] = {
            "tokens_per_second": statistics.median(speeds[name]),
            "ratio": statistics.median(a / b for a, b in zip(speeds[name], base, strict=True)),
            "all_tokens_per_second": speeds[name],
            "seconds": statistics.median(o.seconds for o in rounds),
            "tokens": rounds[0].tokens,
            "running": max(n for o in rounds for n in o.running),
            "mean_running": statistics.fmean(n for o in rounds for n in o.running),
            "held": max(n for o in rounds for n in o.held),
            "retractions": statistics.median(o.retractions for o in rounds),
            "failures": sorted({f for o in rounds for f in o.failures}),
            "latency_p50": _quantile(latencies, 0.5),
            "latency_p99": _quantile(latencies, 0.99),
            "evicted": sum(len(r["evicted_spans"]) for r in records) / len(rounds),
            "peak_kv": sum(r["peak_kv_tokens"] for r in records),
            "peak_kv_without": sum(r["peak_kv_tokens_without"] for r in records),
            "kv_auc": sum(r["kv_auc"] for r in records),
            "kv_auc_without": sum(r["kv_auc_without"] for r in records),
        }
    kept = {k: v for k, v in asdict(scenario).items() if k not in ("jobs", "variants")}
    return {**kept, "requests": len(scenario.jobs), "variants": variants}


def _quantile(values: list[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def show(result: dict[str, Any]) -> None:
    title = f"{result['name']}: {result['what']}; {result['requests']} requests, pool"
    table = Table(title=f"{title} {result['pool']}", title_justify="left")
    columns = ("variant", "tokens/s", "ratio", "time", "running", "ratio", "mean", "ratio")
    for column in (*columns, "retracted", "p50 ms", "p99 ms", "held", "peak KV", "area", "failed"):
        table.add_column(column, justify="right")
    first = next(iter(result["variants"].values()))
    for name, v in result["variants"].items():
        table.add_row(
            name,
            f"{v['tokens_per_second']:.0f}",
            f"{v['ratio']:.3f}",
            f"{v['seconds']:.1f}",
            str(v["running"]),
            f"{v['running'] / first['running']:.2f}",
            f"{v['mean_running']:.1f}",
            f"{v['mean_running'] / first['mean_running']:.2f}",
            f"{v['retractions']:.0f}",
            *(f"{1000 * v[k]:.1f}" if v[k] else "-" for k in ("latency_p50", "latency_p99")),
            str(v["held"]),
            *(
                f"{v[k] / v[f'{k}_without']:.3f}" if v[f"{k}_without"] else "-"
                for k in ("peak_kv", "kv_auc")
            ),
            str(len(v["failures"])),
        )
    console.print(table)
    for name, v in result["variants"].items():
        for failure in v["failures"][:2]:
            console.print(f"{name}: {failure[:300]}", style="yellow", markup=False)


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Speed of memento against the first variant of each scenario, as a picture."""
    names, ratios = [], []
    for result in results:
        for name, variant in list(result["variants"].items())[1:]:
            names.append(f"{result['name']}: {name}")
            ratios.append(variant["ratio"])
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.simple_bar(names, ratios, width=100, title="tokens per second, ratio")
    picture = Console(record=True, width=110, file=sys.stderr)
    picture.print(Text.from_ansi(plotext.build()))
    picture.save_svg(str(out / "serve.svg"), title="benchmarks.serve")


def main(
    flags: Annotated[list[str] | None, typer.Argument(help="SGLang flags, behind --")] = None,
    size: Annotated[str, typer.Option(help=" or ".join(SIZES))] = "cpu",
    model: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "tiny",
    only: Annotated[str, typer.Option(help="Names of scenarios, separated by commas.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Rounds instead of each one's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for serve.json and serve.svg.")] = Path(
        "bench-output"
    ),
) -> None:
    """Measure tokens/s, running requests, retractions, latencies and KV, as ratios."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    groups = [make(SIZES[size]) for make in (small_pool, longer, large_pool)]
    known = {scenario.name for group in groups for scenario in group}
    if unknown := wanted - known:
        raise typer.BadParameter(f"no scenario {unknown}; there are: {', '.join(sorted(known))}")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / model, model)
        for group in groups:
            if chosen := [s for s in group if not wanted or s.name in wanted]:
                for result in run_group(chosen, path, flags or [], rounds):
                    show(result)
                    results.append(result)
                    (out / "serve.json").write_text(json.dumps(results, indent=1))
    plot(results, out)
    console.print(f"written: {out / 'serve.json'}, {out / 'serve.svg'}")


if __name__ == "__main__":
    typer.run(main)
