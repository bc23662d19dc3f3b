"""Stock SGLang and memento side by side on the embedded model: `python -m benchmarks.serve`.

Both servers run at once and take turns, so that a noisy machine hurts both. Same prompts, same
number of tokens (`ignore_eos`); "no markers" prompts make the model write no blocks to speak of.
Absolute figures of a CPU mean nothing: read the ratios. Takes the GPU where there is one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.server import running_server, serve_command
from memento_sgl.demo.task import held_out
from memento_sgl.environment import has_accelerator

ROUNDS = 3
REQUESTS = 16
CONCURRENCY = 8
POOL = 20_000
WORK = {"blocks": 900, "no markers": 300}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def prompts(kind: str) -> list[str]:
    if kind == "blocks":
        return [CHAT.format(p.question) for p in held_out(REQUESTS, sizes=(16, 20, 24))]
    return [f"{number} plain text without any turn. " * 3 for number in range(REQUESTS)]


def run(url: str, kind: str) -> tuple[float, list[dict[str, Any]]]:
    """Output tokens per second of one round, and each request's meta_info."""
    httpx.post(f"{url}/flush_cache", timeout=60)
    sampling = {"temperature": 0, "max_new_tokens": WORK[kind], "ignore_eos": True}

    def one(text: str) -> dict[str, Any]:
        body = {"text": text, "sampling_params": sampling}
        answer = httpx.post(f"{url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        meta: dict[str, Any] = answer.json()["meta_info"]
        return meta

    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        metas = list(pool.map(one, prompts(kind)))
    seconds = time.perf_counter() - started
    return sum(meta["completion_tokens"] for meta in metas) / seconds, metas


def main() -> None:
    console = Console()
    flags = ("--max-total-tokens", str(POOL), "--log-level", "warning")
    cpu = ("--device", "cpu", "--attention-backend", "torch_native")
    commands = {
        "stock": [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(MODEL_DIR)),
            *(() if has_accelerator() else cpu),
            *("--dtype", "float32"),
            *flags,
        ],
        "memento": serve_command("demo", *flags),
    }
    speeds: dict[tuple[str, str], list[float]] = {}
    metas: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("starting both servers (a minute)"):
            urls = {
                name: stack.enter_context(running_server(command, Path(folder) / f"{name}.log"))
                for name, command in commands.items()
            }
        for kind in WORK:
            for number in range(ROUNDS + 1):  # the first round warms up
                for name, url in urls.items():
                    with console.status(f"{kind}, {name}, round {number} of {ROUNDS}"):
                        speed, found = run(url, kind)
                    if number:
                        speeds.setdefault((kind, name), []).append(speed)
                    if (kind, name) == ("blocks", "memento"):
                        metas = found
    _print(console, speeds, [meta["memento"] for meta in metas])


def _print(
    console: Console, speeds: dict[tuple[str, str], list[float]], records: list[dict[str, Any]]
) -> None:
    table = Table(title=f"output tokens per second, median of {ROUNDS}, {CONCURRENCY} at a time")
    for column in ("traffic", "stock", "memento", "ratio"):
        table.add_column(column, justify="right")
    for kind in WORK:
        stock, ours = (statistics.median(speeds[kind, name]) for name in ("stock", "memento"))
        table.add_row(kind, f"{stock:.0f}", f"{ours:.0f}", f"{ours / stock:.3f}")
    console.print(table)
    for name in ("peak_kv_tokens", "kv_auc"):
        held = sum(record[name] for record in records)
        without = sum(record[f"{name}_without"] for record in records)
        console.print(f"{name}: {held} instead of {without}, ratio {held / without:.3f}")


if __name__ == "__main__":
    main()
