"""What the runtime knows about one request. Plain Python; owned by the engine's `Req`.

    logical   0 ................ resume .. point = p ........ n-1
    row       the same minus what `applied` evictions removed below

`applied` counts the evictions that the request's row reflects. A retraction sets it back to zero;
the list itself stays, so that the rebuild replays it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import MutableSequence, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from memento_sgl.rule.accounting import account
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.machine import BlockMachine, Eviction, section_start_of
from memento_sgl.rule.markers import MarkerIds

if TYPE_CHECKING:
    from memento_sgl.observe.watch import Watch


class Match(NamedTuple):
    """What the radix tree answered: for which question, the node that holds the prefix's end, its
    rows, and the evictions that they reflect."""

    asked: tuple[int, int, int]
    node: Any
    rows: int
    applied: int


class RequestState:
    """Markers seen, evictions due and done.

    Attributes:
        evicted: tokens missing from the row.
        match: the radix tree's last answer, while the request waits.
        weight_version: of the weights that the row's KV began with; the tree counts them.
        published: the row has been published since it began.
        left: evictions whose blocks the radix tree knows this request to be done with.
        watch: follows the request for metrics, traces and debug lines; None: nobody wants to know.
        error: why the request ended early; part of its accounting.
    """

    __slots__ = (
        "_fed",
        "_gone",
        "_peaks",
        "_row_ids",
        "_row_reflects",
        "applied",
        "config",
        "error",
        "evicted",
        "left",
        "machine",
        "match",
        "measured_peak",
        "prompt_len",
        "published",
        "watch",
        "weight_version",
    )

    def __init__(
        self,
        prompt: Sequence[int],
        config: MementoConfig,
        markers: MarkerIds,
        options: RequestOptions,
    ) -> None:
        self.config = config.for_request(options)
        start = section_start_of(prompt, self.config, markers, options.assistant_start)
        self.machine = BlockMachine(markers, self.config, section_start=start)
        self.machine.feed_all(prompt)
        self.prompt_len = len(prompt)
        self._fed = len(prompt)
        self.applied = 0
        self.evicted = 0
        self.measured_peak = 0
        self.match: Match | None = None
        self.weight_version = self.left = 0
        self.published = False
        self.watch: Watch | None = None
        self.error: str | None = None
        self._gone = [0]  # tokens of the first n evictions
        self._peaks: list[int] = []  # most rows from the n-th eviction on, before they go
        self._row_ids: MutableSequence[int] | None = None
        self._row_reflects = (0, 0)

    def observe(self, output: Sequence[int]) -> bool:
        """Take the output tokens not seen yet; true if they made an eviction due."""
        total = self.prompt_len + len(output)
        if total == self._fed:
            return False
        new = output[self._fed - self.prompt_len :]
        feed = self.machine.feed_all if self.watch is None else self.watch.feed
        due = feed(new, start=self._fed)
        self._fed = total
        return bool(due)

    @property
    def length(self) -> int:
        """Logical tokens seen: prompt and output."""
        return self._fed

    @property
    def next_eviction(self) -> Eviction | None:
        """The first eviction that the row does not reflect yet."""
        if self.applied < len(self.machine.evictions):
            return self.machine.evictions[self.applied]
        return None

    def row(self, index: int) -> int:
        """Row index of a logical index at or after the applied spans."""
        return index - self.evicted

    def applied_at(self, length: int) -> int:
        """How many evictions a row of the first `length` tokens reflects: the next query is at
        index `length`."""
        return bisect_right(self.machine.evictions, length, key=lambda e: e.point)

    def gone(self, count: int) -> int:
        """Tokens of the first `count` evictions."""
        evictions = self.machine.evictions
        for eviction in evictions[len(self._gone) - 1 :]:
            self._gone.append(self._gone[-1] + eviction.tokens)
        return self._gone[count]

    def end_of(self, rows: int, applied: int) -> int:
        """Logical length of a row's first `rows` rows, if it reflects `applied` evictions."""
        evictions = self.machine.evictions
        passed = bisect_right(
            range(applied), rows - 1, key=lambda i: evictions[i].start - self.gone(i)
        )
        return rows + self.gone(passed)

    def peak_rows(self, length: int) -> int:
        """Most rows that a prefill of the first `length` tokens holds at once, from here on."""
        evictions = self.machine.evictions
        if len(self._peaks) != len(evictions):
            before = [e.point - self.gone(i) for i, e in enumerate(evictions)]
            self._peaks = [*accumulate(reversed(before), max)][::-1]
        ahead = self._peaks[self.applied] if self.applied < len(evictions) else 0
        return max(ahead, self.rows_replayed(length))

    def rows_replayed(self, length: int) -> int:
        """Rows of the first `length` tokens once every eviction seen so far is applied."""
        return length - self.gone(len(self.machine.evictions))

    @property
    def open_since(self) -> int:
        """Logical index behind the last closed memento, or where the output began."""
        blocks = self.machine.blocks
        return max(blocks[-1].summary_end + 1 if blocks else 0, self.prompt_len)

    @property
    def blocks_kept(self) -> int:
        """Mementos that still close before one of them evicts a block."""
        keep = 1 if self.config.keep_last_block_for_answer else self.config.keep_last_n_blocks
        return max(keep - len(self.machine.blocks), 0)

    def apply(self) -> Eviction:
        """Count the next eviction as done."""
        eviction = self.machine.evictions[self.applied]
        self.applied += 1
        self.evicted += eviction.tokens
        return eviction

    def restore(self, applied: int) -> bool:
        """The row will start from a cached prefix that reflects the first `applied` evictions;
        true if that changes what the row reflects."""
        if applied == self.applied:
            return False
        self.applied = applied
        self.evicted = self.gone(applied)
        return True

    def begin_row(self, weight_version: int) -> None:
        """A row is about to begin with what the radix tree has of these weights."""
        self.weight_version = weight_version
        self.left = 0
        self.published = False

    def reset(self) -> None:
        """The row is gone (retraction): nothing is applied."""
        self.applied = self.evicted = 0

    def row_ids(
        self, ids: MutableSequence[int], prompt: array[int], output: array[int]
    ) -> MutableSequence[int]:
        """The tokens of the row and behind it: `ids` brought up to date in place if this made it
        before, at the price of what has changed since."""
        length = len(prompt) + len(output)
        applied, known = self._row_reflects
        if ids is not self._row_ids or applied > self.applied or known > length:
            ids = self.visible(prompt + output)
        else:
            known = max(known, len(prompt))
            ids += output[known - len(prompt) :]
            for index in range(applied, self.applied):
                _, start, end, _ = self.machine.evictions[index]
                del ids[start - self.gone(index) : end - self.gone(index)]
        self._row_ids, self._row_reflects = ids, (self.applied, length)
        return ids

    def visible(self, logical: MutableSequence[int]) -> MutableSequence[int]:
        """The tokens of `logical` that are in the row, in order; same type as given."""
        kept = logical[:0]
        last = 0
        for eviction in self.machine.evictions[: self.applied]:
            kept += logical[last : eviction.start]
            last = eviction.end
        kept += logical[last:]
        return kept

    def report(self, output: Sequence[int]) -> dict[str, Any]:
        """Accounting over the prompt and the given output, ready for JSON."""
        self.observe(output)
        record = account(self.machine, self.prompt_len, self.prompt_len + len(output)).as_dict()
        if self.measured_peak:
            record["measured_peak_kv_tokens"] = self.measured_peak
        if self.error is not None:
            record["error"] = self.error
        return record
