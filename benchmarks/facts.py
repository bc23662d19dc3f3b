"""How many hand-made facts survive in mementos.

    python -m benchmarks.facts

Twenty short traces of several fields with 84 facts (numbers, formulas, results), by the offline
baseline. For a run with a model: `memento convert benchmarks/facts/traces.jsonl --out WORK ...`
with the options below, then `memento report WORK --facts benchmarks/facts/facts.jsonl`.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from memento_pipeline.read.rows import ReadOptions
from memento_pipeline.report.quality import Recall, of_run, read_reference
from memento_pipeline.run.convert import run_stages
from memento_pipeline.run.converted import converted
from memento_pipeline.run.run_options import RunOptions
from memento_pipeline.stages.segment import SegmentOptions
from memento_pipeline.store.folder import Store
from memento_pipeline.text.tokens import load_counter

FOLDER = Path(__file__).parent / "facts"
TRACES, FACTS = FOLDER / "traces.jsonl", FOLDER / "facts.jsonl"
MIN_TRACE, MIN_BLOCK = 60, 60  # tokens: the traces are short, and several blocks each are wanted


def baseline() -> Recall:
    """The facts that the mementos by rules keep."""
    with TemporaryDirectory() as folder:
        options = RunOptions(
            inputs=(TRACES,),
            out=Path(folder),
            read=ReadOptions(min_tokens=MIN_TRACE),
            segment=SegmentOptions(min_tokens=MIN_BLOCK),
        )
        settings = options.settings(load_counter(None).name)
        with Store(options.out, settings) as store:
            run_stages(options, store, display=False)
            return of_run(converted(store), read_reference(FACTS))


def main() -> None:
    recall = baseline()
    for kept in recall.models:
        print(
            f"{kept.model}: {kept.kept} of {kept.facts} facts of {kept.traces} traces "
            f"({kept.recall:.0%}), memento tokens per block token {kept.ratio:.2f}"
        )


if __name__ == "__main__":
    main()
