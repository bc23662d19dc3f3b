"""Running sums over converted traces, for the card: nothing grows with their number."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from memento_pipeline.output.assemble import Assembled
from memento_pipeline.records import Converted, Rejected, Status

PASS_SCORE = 8.0
_VARIABLE = re.compile(r"\d[\d.,]*")


class Stats:
    """Add every trace once; `summary` may be called at any time."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer
        self._statuses: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._makers: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._known: Counter[str] = Counter()
        self._dollars = 0.0

    def add(self, done: Converted, row: Assembled | None) -> None:
        """Count a trace and its row (None where the trace is not ok)."""
        written = row is not None and row.row is not None
        status = Status.OK if written else Status.FILTERED if row is not None else done.status
        self._statuses[status.value] += 1
        for name in ("prompt_tokens", "completion_tokens", "dollars"):
            value = getattr(done.usage, name)
            if value is not None:
                self._known[name] += 1
                if name == "dollars":
                    self._dollars += value
                else:
                    self._sums[name] += value
        self._sums["calls"] += done.usage.calls
        if not written:
            reason = done.reason if row is None else row.reason
            self._reasons[reason_kind(reason or "unknown")] += 1
            return
        assert row is not None
        assert done.segmentation is not None
        self._sums["blocks"] += row.blocks
        self._sums["escaped"] += row.escaped
        self._sums["response_tokens"] += row.tokens
        self._sums["cut_rows"] += row.blocks < len(done.segmentation.blocks)
        self._sums["relaxed_rows"] += bool(done.segmentation.relaxed)
        for block, memento in zip(
            done.segmentation.blocks[: row.blocks], done.mementos, strict=False
        ):
            self._sums["block_tokens"] += block.tokens
            self._sums["memento_tokens"] += memento.tokens
            self._makers[memento.made_by] += 1
            first = memento.history[0].judge_score if memento.history else memento.judge_score
            if memento.judge_score is not None:
                self._sums["judged"] += 1
                self._sums["passed"] += memento.judge_score >= PASS_SCORE
                self._sums["passed_first"] += first is not None and first >= PASS_SCORE

    def reject(self, bad: Rejected) -> None:
        """Count an input row that is no trace."""
        self._statuses["rejected"] += 1
        self._reasons[reason_kind(bad.reason)] += 1

    def summary(self) -> dict[str, Any]:
        """Counts and means; null where there is nothing to say."""
        sums, blocks = self._sums, self._sums["blocks"]
        return {
            "tokenizer": self.tokenizer,
            "statuses": dict(self._statuses),
            "reasons": dict(self._reasons.most_common()),
            "made_by": dict(self._makers.most_common()),
            "rows": self._statuses["ok"],
            "blocks": blocks,
            "mean_blocks": _ratio(blocks, self._statuses["ok"]),
            "mean_block_tokens": _ratio(sums["block_tokens"], blocks),
            "mean_memento_tokens": _ratio(sums["memento_tokens"], blocks),
            "memento_ratio": _ratio(sums["memento_tokens"], sums["block_tokens"]),
            "response_tokens": sums["response_tokens"],
            "judged": sums["judged"],
            "pass_rate_first": _ratio(sums["passed_first"], sums["judged"]),
            "pass_rate": _ratio(sums["passed"], sums["judged"]),
            "cut_rows": sums["cut_rows"],
            "relaxed_rows": sums["relaxed_rows"],
            "escaped": sums["escaped"],
            "calls": sums["calls"],
            "prompt_tokens": sums["prompt_tokens"] if self._known["prompt_tokens"] else None,
            "completion_tokens": (
                sums["completion_tokens"] if self._known["completion_tokens"] else None
            ),
            "dollars": self._dollars if self._known["dollars"] else None,
        }


def reason_kind(reason: str) -> str:
    """A reason without its figures, so that like cases are counted together."""
    return _VARIABLE.sub("N", reason.splitlines()[0])[:120]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
