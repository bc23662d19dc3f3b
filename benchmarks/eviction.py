"""What one eviction costs: `python -m benchmarks.eviction`.

Edits rows of SGLang's own tables, as a decode step does, for different tails (the memento behind
the block), rows and batches. There is no KV at all here: slot ids move. `KV bytes` is what a
runtime that moves KV instead copies for an 8B model. Takes the GPU where there is one.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from memento_sgl.engine.eviction import RowEdit, edit_rows
from memento_sgl.engine.runtime import Runtime
from memento_sgl.request.settings import Settings
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import MarkerIds

ROUNDS = 50
BLOCK, TAIL, ROW, BATCH = 1150, 200, 4096, 1
BYTES_PER_TOKEN = 36 * 8 * 128 * 2 * 2  # layers x KV heads x head size x K and V x bfloat16


def measure(block: int, tail: int, row: int, batch: int) -> float:
    """Median seconds of one step's evictions: one for each of `batch` requests."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = ReqToTokenPool(batch, row + 8, device, False)
    pool = TokenToKVPoolAllocator(batch * row + 8, torch.float32, device, None, False)
    config = MementoConfig(enable=True, mask_delimiters=False)
    runtime = Runtime(Settings(config, MarkerIds(1, 2, 3, 4, 5, 6, 7)))
    engine = SimpleNamespace(req_to_token_pool=rows, token_to_kv_pool_allocator=pool)
    end = row - tail
    edits = [
        RowEdit(
            slot=slot,
            start=end - block,
            free_start=end - block,
            end=end,
            keep_end=row,
            old_length=row,
            length=row - block,
            redone=0,
            evicted=block,
        )
        for slot in range(batch)
    ]
    times = []
    for number in range(ROUNDS + 5):
        pool.clear()
        for slot in range(batch):
            rows.req_to_token[slot, :row] = pool.alloc(row).to(torch.int32)
        _wait(device)
        started = time.perf_counter()
        edit_rows(runtime, engine, edits)
        _wait(device)
        if number >= 5:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    table = Table(title="one step's evictions: time, and bytes moved")
    for column in ("varied", "block", "tail", "row", "requests", "us", "id bytes", "KV bytes"):
        table.add_column(column, justify="right")
    cases = [("tail", BLOCK, tail, ROW, BATCH) for tail in (50, 200, 1000)]
    cases += [("row", BLOCK, TAIL, row, BATCH) for row in (2048, 8192, 32768)]
    cases += [("block", block, TAIL, ROW, BATCH) for block in (100, 1150, 3000)]
    cases += [("requests", BLOCK, TAIL, ROW, batch) for batch in (1, 16, 64)]
    for name, block, tail, row, batch in cases:
        seconds = measure(block, tail, row, batch)
        moved = batch * tail
        table.add_row(
            name,
            *map(str, (block, tail, row, batch)),
            f"{1e6 * seconds:.0f}",
            f"{4 * moved:,}",
            f"0 instead of {moved * BYTES_PER_TOKEN:,}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
