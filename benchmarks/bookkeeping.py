"""CPU time of a long prompt's bookkeeping: `python -m benchmarks.bookkeeping [--against CHECKOUT]`.

One prompt of many finished 7-token blocks is prefilled in segments by what the scheduler calls of
this project (match, reservation, publishing, eviction of each block, fill ids), with the real pool
and radix tree and without a model, an engine or forward passes. `--against` runs the same on the
code of another checkout, turn by turn in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCK, MEMENTO, ROUNDS = 7, 3, 3
POOL = 50_000
SIZES = (100, 200, 400, 3200)
ROOT = Path(__file__).parent.parent


class Request:
    """What bookkeeping touches of SGLang's request."""

    rid, extra_key, cache_salt, priority, to_finish = "0", None, None, 0, None
    return_logprob, logprob_start_len = False, -1
    skip_radix_cache_insert = False

    def __init__(self, prompt: array[int], state: Any) -> None:
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        self.origin_input_ids, self.output_ids = prompt, array("q")
        self.memento, self.kv = state, ReqKvInfo()
        self.full_untruncated_fill_ids = array("q")
        self.prefix_len = self.extend_end = self.already_computed = 0
        self.last_node: Any = None
        self.lock: Any = None
        self.sampling_params = SimpleNamespace(max_new_tokens=1, ignore_eos=True)

    def finished(self) -> bool:
        return False

    def _compute_max_prefix_len(self, length: int) -> int:
        return length - 1

    def refresh_fill_ids(self) -> None:
        from memento_patches.schedule_batch import around_refresh_fill_ids

        around_refresh_fill_ids(_plain_fill_ids, self)


def _plain_fill_ids(req: Request) -> None:
    if not req.full_untruncated_fill_ids:
        req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids


def measure(blocks: int) -> float:
    """Seconds of CPU for one prompt."""
    import torch
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from memento_sgl.admission.budget import Admission
    from memento_sgl.cache.prefix import PrunableRadixCache
    from memento_sgl.engine.eviction import evict_prefix, rows_to_next_point
    from memento_sgl.engine.runtime import Runtime
    from memento_sgl.request.settings import Settings
    from memento_sgl.request.state import RequestState
    from memento_sgl.rule.config import MementoConfig, RequestOptions
    from memento_sgl.rule.markers import MarkerIds

    markers = MarkerIds(1, 2, 3, 4)
    config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
    one = [1, *range(10, 10 + BLOCK), 2, 3, *range(30, 30 + MEMENTO), 4]
    prompt = array("q", [9, 9, 9, *one * blocks, 9, 9])
    pool = POOL
    allocator = TokenToKVPoolAllocator(pool, torch.float32, "cpu", None, False)
    rows = ReqToTokenPool(4, pool, "cpu", False)
    tree = PrunableRadixCache(CacheInitParams(False, rows, allocator, 1), markers)
    runtime, admission = Runtime(Settings(config, markers)), Admission(config)
    state = RequestState(prompt, config, markers, RequestOptions())
    req = Request(prompt, state)

    began = time.process_time()
    req.refresh_fill_ids()
    params = MatchPrefixParams(key=RadixKey(req.full_untruncated_fill_ids), req=req)
    req.last_node = tree.match_prefix(params).last_device_node
    rows.alloc([req])
    req.lock = tree.lock(req.last_node)
    while req.prefix_len < len(req.full_untruncated_fill_ids):
        req.refresh_fill_ids()
        admission.estimate_waiting(req, 1)
        limit, left = rows_to_next_point(req), len(req.full_untruncated_fill_ids) - req.prefix_len
        count = left if limit is None else min(limit, left)
        slots = allocator.alloc(count)
        end = req.prefix_len + count
        rows.write((req.kv.req_pool_idx, slice(req.prefix_len, end)), slots.to(torch.int32))
        req.kv.kv_committed_len = req.kv.kv_allocated_len = req.extend_end = end
        tree.checkpoint(req, up_to=end)
        req.prefix_len = end
        evict_prefix(runtime, req, allocator, tree)
    assert state.applied == blocks
    return time.process_time() - began


def run(checkout: Path, blocks: int) -> float:
    folders = (checkout, *(checkout / part for part in ("frontend", "pipeline", "patches")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-P", "-W", "ignore", __file__, "--one", str(blocks)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure this many blocks once and print seconds")
    parser.add_argument("--against", type=Path, help="another checkout; at most 400 blocks there")
    chosen = parser.parse_args(arguments)
    if chosen.one is not None:
        measure(2)  # what happens once per process
        print(measure(chosen.one))
        return
    builds = {"now": ROOT} | ({"before": chosen.against.resolve()} if chosen.against else {})
    print(f"seconds of CPU, median of {ROUNDS}; {BLOCK}-token blocks, {MEMENTO}-token mementos")
    for blocks in SIZES:
        times: dict[str, list[float]] = {name: [] for name in builds}
        for _ in range(ROUNDS):
            for name, checkout in builds.items():
                if name == "now" or blocks <= 400:
                    times[name].append(run(checkout, blocks))
        medians = {name: statistics.median(found) for name, found in times.items() if found}
        figures = ", ".join(f"{name} {seconds:.4f}" for name, seconds in medians.items())
        ratio = f", {medians['before'] / medians['now']:.0f} times less" if len(medians) > 1 else ""
        print(f"{blocks:5} blocks: {figures}{ratio}", flush=True)


if __name__ == "__main__":
    main()
