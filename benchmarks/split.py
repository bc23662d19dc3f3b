"""Characters per second of the splitter, and whether it stays linear.

    python benchmarks/split.py [TRACES.jsonl]

The published splitter was measured at 0.56 million characters per second on two shared CPU cores,
and takes quadratic time on some input. Counting tokens (by the built-in approximation) is included.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

from memento_pipeline.read.rows import read_traces
from memento_pipeline.records import Trace
from memento_pipeline.text.split import split
from memento_pipeline.text.tokens import load_counter

PUBLISHED = 0.56  # million characters per second
EXAMPLES = Path(__file__).parents[1] / "examples" / "traces.jsonl"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)


def inputs(source: Path) -> dict[str, str]:
    """Texts to repeat: real traces, and what costs a careless splitter quadratic time."""
    traces = [trace.thought for trace in read_traces([source]) if isinstance(trace, Trace)]
    return {
        "traces": "\n\n".join(traces) + "\n\n",
        "one long line": "word. Word ",
        "open brackets": "f(x [y \\( ",
        "open code": "```\nx = 1. Y\n",
        "blank lines": "\n",
    }


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES
    counter = load_counter()
    print(f"{platform.machine()}, Python {platform.python_version()}, million characters a second")
    print(f"{'input':>14}" + "".join(f"{size:>12,}" for size in SIZES) + f"{'published':>12}")
    for name, part in inputs(source).items():
        line = f"{name:>14}"
        for size in SIZES:
            text = (part * (size // len(part) + 1))[:size]
            best = float("inf")
            for _ in range(3 if size <= 1_000_000 else 1):
                start = time.perf_counter()
                sentences = split(text, counter)
                best = min(best, time.perf_counter() - start)
            assert "".join(sentences.texts(text)) == text
            line += f"{size / best / 1e6:12.2f}"
        print(line + (f"{PUBLISHED:12.2f}" if name == "traces" else ""), flush=True)


if __name__ == "__main__":
    main()
