"""Characters per second of reading rows of several forms, as processor time of this process.

    python benchmarks/read.py [TRACES.jsonl]

The traces are written in each form to a temporary folder, as often as makes `CHARACTERS`, and read
again; the best of `ROUNDS` counts. Whole traces show what a character costs, traces of 2,500
characters what a row costs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from memento_pipeline.read.rows import read_traces
from memento_pipeline.records import Trace

EXAMPLES = Path(__file__).parents[1] / "examples" / "traces.jsonl"
CHARACTERS = 4_000_000
SHORT = 2500  # characters
ROUNDS = 5
ANSWER = "The answer is 42."


def forms(number: int, thought: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One trace as a row of each form."""
    asked, text = f"Problem {number}", f"<think>\n{thought}\n</think>\n\n{ANSWER}"
    user = {"role": "user", "content": asked}
    reasoned = {"role": "assistant", "content": ANSWER, "reasoning_content": thought}
    half = len(thought) // 2
    blocks = "".join(
        f"<|block_start|>{part}<|block_end|>\n<|summary_start|>\nShort.\n<|summary_end|>\n"
        for part in (thought[:half], thought[half:])
    )
    yield "columns", {"id": str(number), "problem": asked, "cot": thought, "answer": ANSWER}
    yield "response", {"id": str(number), "problem": asked, "response": text}
    yield "messages", {"messages": [user, {"role": "assistant", "content": text}]}
    yield "reasoning_content", {"messages": [user, reasoned]}
    yield "OpenMementos", {"problem": asked, "response": f"<think>\n{blocks}</think>\n{ANSWER}"}


def write(folder: Path, thoughts: list[str]) -> list[Path]:
    """A file of JSON lines for each form, and two as Parquet."""
    rows: dict[str, list[dict[str, Any]]] = {}
    count = CHARACTERS * len(thoughts) // sum(map(len, thoughts))
    for number in range(count):
        for form, row in forms(number, f"{number} {thoughts[number % len(thoughts)]}"):
            rows.setdefault(form, []).append(row)
    files = []
    for form, some in rows.items():
        files.append(folder / f"{form}.jsonl")
        files[-1].write_text("".join(f"{json.dumps(row)}\n" for row in some))
    for form in ("columns", "messages"):
        files.append(folder / f"{form}.parquet")
        pq.write_table(pa.Table.from_pylist(rows[form]), files[-1])
    return files


def speed(file: Path) -> float:
    """Million characters of thought per second of processor time."""
    best, size = float("inf"), 0
    for _ in range(ROUNDS):
        start = time.process_time()
        size = sum(len(trace.thought) for trace in read_traces([file]) if isinstance(trace, Trace))
        best = min(best, time.process_time() - start)
    return size / best / 1e6


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES
    whole = [trace.thought for trace in read_traces([source]) if isinstance(trace, Trace)]
    print(f"{'million characters a second':>28}{'whole traces':>14}{'short ones':>14}")
    with tempfile.TemporaryDirectory() as long, tempfile.TemporaryDirectory() as short:
        pairs = zip(
            write(Path(long), whole),
            write(Path(short), [thought[:SHORT] for thought in whole]),
            strict=True,
        )
        for pair in pairs:
            print(f"{pair[0].name:>28}" + "".join(f"{speed(file):14.0f}" for file in pair))


if __name__ == "__main__":
    main()
