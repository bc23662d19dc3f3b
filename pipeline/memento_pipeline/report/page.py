"""`memento report`: one HTML file about a work folder, complete in itself.

Two passes of the same thing in one: every finished trace is counted (`Tally`), and a uniform sample
of them goes into the page to be browsed. Memory and file size are bounded by the sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from memento_pipeline.output.sinks import write_whole
from memento_pipeline.output.stats import PASS_SCORE, reason_kind
from memento_pipeline.records import Converted, Memento
from memento_pipeline.report.charts import Chart, histogram
from memento_pipeline.report.quality import Recall, read_reference
from memento_pipeline.report.tally import Tally
from memento_pipeline.run.converted import converted
from memento_pipeline.store.folder import Store
from memento_pipeline.store.schema import Paid
from memento_sgl.errors import ConfigError
from memento_sgl.offline.view.html import embedded, render_page, verbatim

MOST_CHARACTERS = 20_000
"""Of one text in the browser; the store has all of it."""
SEED = 0
T = TypeVar("T")

UNKNOWN = "unknown"
NOT_JUDGED = "not judged"


class Line(NamedTuple):
    """A figure of this run beside the published one. `source`: whose figure that is."""

    name: str
    here: str
    published: str
    source: str


class Sample(Generic[T]):
    """At most `size` of the items offered, each with the same chance; in the order offered."""

    def __init__(self, size: int, seed: int = SEED) -> None:
        self.size = size
        self.seen = 0
        self._random = random.Random(seed)
        self._kept: list[tuple[int, T]] = []

    def offer(self, item: T) -> None:
        self.seen += 1
        if len(self._kept) < self.size:
            self._kept.append((self.seen, item))
        elif (place := self._random.randrange(self.seen)) < self.size:
            self._kept[place] = (self.seen, item)

    @property
    def items(self) -> list[T]:
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]


def write_report(folder: Path, out: Path, traces: int, facts: Path | None = None) -> Path:
    """Write the report of a work folder to `out`, with at most `traces` traces to browse.

    Args:
        facts: a reference (see `quality`), for the recall of facts in mementos.

    Raises:
        StoreError: the folder is in use, damaged or no work folder.
        ConfigError: no trace is finished yet, or the reference does not fit.
    """
    recall = Recall(read_reference(facts)) if facts is not None else None
    tally, sample = Tally(), Sample[Converted](traces)
    with Store(folder, create=False) as store:
        for done in converted(store):
            tally.add(done)
            if recall is not None:
                recall.add(done)
            sample.offer(done)
        counts, bill, settings = store.counts(), store.bill(), store.settings
        for bad in store.rejected():
            tally.reasons["rejected", reason_kind(bad.reason)] += 1
    if not sum(counts.values()):
        raise ConfigError(f"{folder} holds no traces yet: run `memento convert` first")
    page = render(folder.resolve().name, tally, sample, counts, bill, settings, recall)
    write_whole(out, page)
    return out


def render(
    name: str,
    tally: Tally,
    sample: Sample[Converted],
    counts: Mapping[str, int],
    bill: Sequence[Paid],
    settings: Mapping[str, Any],
    recall: Recall | None = None,
) -> str:
    """The page."""
    shown = [browsed(done) for done in sample.items]
    return render_page(
        "report.html",
        name=name,
        style=verbatim("report.css"),
        script=verbatim("report.js"),
        data=embedded(shown),
        shown=len(shown),
        finished=sample.seen,
        counts={status: count for status, count in sorted(counts.items()) if count},
        reasons=tally.reasons.most_common(),
        makers=tally.makers.most_common(),
        tokenizers=sorted(tally.tokenizers),
        lines=compared(tally, bill),
        charts=charts(tally),
        bill=[_priced(paid) for paid in bill] + ([total(bill)] if bill else []),
        settings=json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True),
        unreported=tally.unreported_traces,
        pass_score=f"{PASS_SCORE:g}",
        recall=recall,
    )


def compared(tally: Tally, bill: Sequence[Paid]) -> list[Line]:
    """This run's figures beside the published ones."""
    asked = bool(bill)
    calls = _figure(tally.calls.mean, 1) if asked else "0 (no model asked)"
    times = _figure(tally.read_again.mean, 1, "x") if asked else "0 (no model asked)"
    paper, pipeline = "paper", "published pipeline, one trace of 12k tokens"
    return [
        Line("sentence ends per trace", _figure(tally.sentence_edges.mean, 1), "397", paper),
        Line("where a block may end", _figure(tally.candidates.mean, 1), "187", paper),
        Line("blocks per trace", _figure(tally.blocks.mean, 1), "not stated", paper),
        Line("tokens per block", _figure(tally.block_tokens.mean), "1,150", paper),
        Line("tokens per memento", _figure(tally.memento_tokens.mean), "194", paper),
        Line("memento tokens / block tokens", _percent(tally.ratio), "15-25 %", paper),
        Line("pass the judge at first", _percent(tally.pass_first, NOT_JUDGED), "28 %", paper),
        Line("pass in the end", _percent(tally.pass_last, NOT_JUDGED), "92 %", paper),
        Line("calls per trace", calls, "51", pipeline),
        Line("tokens paid / thought tokens", times, "14.5x", pipeline),
    ]


def charts(tally: Tally) -> list[Chart]:
    """The distributions that have values."""
    size, score = "tokens", "points"
    judged = [("at first", tally.first_scores), ("in the end", tally.last_scores)]
    passes = [(PASS_SCORE, f"passes from {PASS_SCORE:g}")]
    made = [
        histogram("Blocks per trace", "blocks", [("", tally.blocks)]),
        histogram("Block size", size, [("", tally.block_tokens)], paper=[(1150, "paper 1,150")]),
        histogram("Memento size", size, [("", tally.memento_tokens)], paper=[(194, "paper 194")]),
        histogram(
            "Compression: memento per 100 block tokens",
            "%",
            [("", tally.percent)],
            paper=[(15, "paper 15 %"), (25, "paper 25 %")],
        ),
        histogram("Judge score", score, judged, paper=passes, most=11, whole=True),
        histogram("Calls per trace", "calls", [("", tally.calls)]),
    ]
    return [chart for chart in made if chart is not None]


def browsed(done: Converted) -> dict[str, Any]:
    """What the browser shows of a trace; JSON values only."""
    trace, cut = done.trace, done.segmentation
    blocks = []
    for number, block in enumerate(cut.blocks if cut else ()):
        memento = done.mementos[number] if number < len(done.mementos) else None
        blocks.append(
            {
                "text": _short(block.text(trace.thought)),
                "tokens": block.tokens,
                "sentences": [block.first_sentence, block.last_sentence],
                "cut": _cut_score(done, block.last_sentence),
                "memento": None if memento is None else _memento(memento),
            }
        )
    return {
        "id": trace.id,
        "status": done.status.value,
        "reason": done.reason,
        "problem": _short(trace.problem),
        "answer": _short(trace.answer),
        "thought": None if blocks else _short(trace.thought),
        "place": _place(trace.provenance),
        "tokens": sum(done.sentences.tokens) if done.sentences else None,
        "sentences": len(done.sentences) if done.sentences else None,
        "candidates": len(done.sentences.candidates) if done.sentences else None,
        "objective": cut.objective if cut else None,
        "relaxed": list(cut.relaxed) if cut else [],
        "usage": done.usage.model_dump(),
        "blocks": blocks,
    }


def _memento(memento: Memento) -> dict[str, Any]:
    return {
        "text": _short(memento.text),
        "tokens": memento.tokens,
        "score": memento.judge_score,
        "passed": memento.passed,
        "by": memento.made_by,
        "history": [
            attempt.model_dump() | {"text": _short(attempt.text)} for attempt in memento.history
        ],
    }


def _cut_score(done: Converted, boundary: int) -> dict[str, Any] | None:
    """The grade of the boundary at which a block ends; None at the end of the thought."""
    scores = done.scores
    if scores is None or boundary not in scores.boundaries:
        return None
    index = scores.boundaries.index(boundary)
    return {"score": scores.scores[index], "by": scores.decided_by[index]}


def _place(provenance: Mapping[str, Any]) -> str:
    file = Path(str(provenance["file"])).name if "file" in provenance else ""
    return f"{file}:{provenance['row']}" if file and "row" in provenance else file


def _short(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    left = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]}\n[... {left:,} more characters in the store]"


def _priced(paid: Paid) -> dict[str, str]:
    dollars = UNKNOWN if paid.dollars is None else f"${paid.dollars:,.4f}"
    tokens = _partly(_figure(paid.prompt_tokens), paid.unreported)
    if paid.cached_tokens is not None:
        tokens += f" ({paid.cached_tokens:,} cached)"
    return {
        "stage": paid.stage,
        "model": paid.model,
        "answers": f"{paid.answers:,}",
        "prompt_tokens": tokens,
        "completion_tokens": _partly(_figure(paid.completion_tokens), paid.unreported),
        "dollars": _partly(dollars, paid.unpriced),
    }


def _partly(figure: str, missing: int) -> str:
    """A sum to which some answers did not contribute is a lower bound."""
    if figure == UNKNOWN or not missing:
        return figure
    return f"at least {figure} ({missing:,} answers unknown)"


def total(bill: Iterable[Paid]) -> dict[str, str]:
    """The bill in one line."""
    parts = list(bill)
    tokens = [
        [value for paid in parts if (value := getattr(paid, name)) is not None]
        for name in ("prompt_tokens", "completion_tokens", "dollars", "cached_tokens")
    ]
    return _priced(
        Paid(
            "all",
            "",
            sum(paid.answers for paid in parts),
            sum(tokens[0]) if tokens[0] else None,
            sum(tokens[1]) if tokens[1] else None,
            sum(paid.unreported for paid in parts),
            sum(tokens[2]) if tokens[2] else None,
            sum(paid.unpriced for paid in parts),
            sum(tokens[3]) if tokens[3] else None,
        )
    )


def _figure(value: float | None, digits: int = 0, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}{unit}"


def _percent(share: float | None, without: str = UNKNOWN) -> str:
    return without if share is None else f"{100 * share:.1f} %"
