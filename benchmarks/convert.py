"""What a trace costs with an endpoint.

    python benchmarks/convert.py [TRACES.jsonl]

The endpoint is the canned server of the tests, whose judge passes about as many mementos as the
paper reports (28 % at first, 92 % after refinement); it counts four characters as a token. The
published pipeline makes 51 calls with 14.5 times the trace's tokens for a trace of 12,000 tokens.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from memento_pipeline.run.converted import converted
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_pipeline.store.folder import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "pipeline"))
from scenes import options, run, serving

EXAMPLES = Path(__file__).parents[1] / "examples" / "traces.jsonl"


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES
    gate = SummarizeOptions(gate_mean=0, gate_least=0)
    with TemporaryDirectory() as folder:
        with serving(cache=True) as server:
            run(options(Path(folder) / "llm", source, server.url, summarize=gate))
        with Store(Path(folder) / "llm", create=False) as store:
            done = list(converted(store))
    characters = sum(len(trace.trace.thought) for trace in done)
    blocks = sum(len(trace.mementos) for trace in done)
    calls, cached = dict(server.calls), server.cached
    tokens = server.tokens["in"] + server.tokens["out"]
    total = calls.pop("all")
    print(f"{platform.machine()}, Python {platform.python_version()}, {source.name}")
    print(f"{len(done)} traces, {characters} characters, {blocks} blocks")
    print(f"calls a trace        {total / len(done):.1f} {calls}")
    print(f"tokens, multiples    {tokens / (characters / 4):.2f}, published 14.5")
    discounted = tokens - 0.9 * cached
    print(f"cached input a tenth {discounted / (characters / 4):.2f}")
    for stage in ("score", "summarize", "review", "refine", "judge"):
        spent = [server.by_stage[f"{stage} {way}"] / (characters / 4) for way in ("in", "out")]
        print(f"  {stage:10} in {spent[0]:.2f} out {spent[1]:.2f}")


if __name__ == "__main__":
    main()
