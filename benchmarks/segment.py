"""Time and rounds of the exact segmentation: `python benchmarks/segment.py`."""

from __future__ import annotations

import platform
import time

import numpy as np
from memento_pipeline.stages.segment import SegmentOptions, segment

SCORES = {
    "integer": lambda rng, n: rng.integers(0, 4, n),
    "half": lambda rng, n: rng.integers(0, 7, n) / 2,
    "continuous": lambda rng, n: rng.random(n) * 3,
}


def main() -> None:
    print(f"{platform.machine()}, numpy {np.__version__}, best of 3, seconds")
    print(f"{'units':>6} {'tokens':>8} {'scores':>11} {'blocks':>7} {'f':>8} {'seconds':>8}")
    for count in (187, 500, 1000, 2000):
        for kind, draw in SCORES.items():
            rng = np.random.default_rng(count)
            sizes = rng.lognormal(4, 0.6, count).astype(int) + 5
            scores = draw(rng, count - 1)
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                cuts, value = segment(sizes, scores, SegmentOptions())
                best = min(best, time.perf_counter() - start)
            print(
                f"{count:6} {sizes.sum():8} {kind:>11} {len(cuts) + 1:7} {value:8.4f} {best:8.3f}"
            )


if __name__ == "__main__":
    main()
