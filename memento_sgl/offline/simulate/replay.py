"""Block eviction replayed offline: what a request would have held in KV under other options.

The rule is `machine.replay` and the figures are `accounting.account`, the same as on the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memento_sgl.errors import DataError
from memento_sgl.offline.inputs.formats import Trace
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.rule.accounting import Accounting, account, kv_curve
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import Block, BlockMachine, Eviction, replay
from memento_sgl.rule.markup import resolve_checked

UNKNOWN = -1
"""Id of a token of which a file only has the number."""


class Tokens(NamedTuple):
    """A trace in tokens; `pieces` are the texts they stand for, if they were asked for."""

    ids: list[int]
    prompt_len: int
    assistant_start: int | None
    pieces: list[str]


class Replayer:
    """Turns traces into tokens and runs the rule over them.

    Args:
        config: options with `mask_delimiters` settled; `keep_last_n_blocks` is given per run.

    Raises:
        MarkerError: a marker is not exactly one token of this tokenizer.
    """

    def __init__(self, tokenizer: TextTokenizer, config: MementoConfig) -> None:
        self.tokenizer = tokenizer
        self.config, markup = tokenizer.own_markup(config)
        self.markers = resolve_checked(self.config, markup, tokenizer)
        self._opening: list[int] = []
        if markup is not None:
            self._opening = tokenizer.encode(markup.opening)
        self._newline = tokenizer.encode("\n")

    def tokens(self, trace: Trace, *, pieces: bool = False) -> Tokens:
        """Ids of prompt and output, and where the output starts.

        Raises:
            DataError: no token at all, or, for `pieces`, one that the tokenizer does not have.
        """
        start = trace.assistant_start
        if isinstance(trace.prompt, int) and start is None:
            start = trace.prompt
        head = self._tokens([] if trace.prompt is None else trace.prompt, pieces)
        tail = self._tokens(trace.output, pieces)
        ids = head[0] + tail[0]
        for block in trace.blocks:
            for index, marker in zip(block, self.markers[:4], strict=True):
                ids[index] = marker
        if not ids:
            raise DataError("no tokens")
        size = self._prompt_len(ids) if trace.prompt is None else len(head[0])
        return Tokens(ids, size, start, head[1] + tail[1])

    def machine(self, tokens: Tokens, keep_last: int | None = None) -> BlockMachine:
        """The rule's state after all tokens; `keep_last` replaces `keep_last_n_blocks`."""
        config = self.config
        if keep_last is not None:
            config = MementoConfig.parse(config.model_dump() | {"keep_last_n_blocks": keep_last})
        ids, size = tokens.ids, tokens.prompt_len
        return replay(ids, size, self.markers, config, assistant_start=tokens.assistant_start)

    def _tokens(self, part: str | Sequence[int] | int, pieces: bool) -> tuple[list[int], list[str]]:
        if isinstance(part, int):
            return [UNKNOWN] * part, [""] * part
        if isinstance(part, str):
            return self.tokenizer.split(part)
        ids = list(part)
        return ids, self.tokenizer.pieces(ids) if pieces else []

    def _prompt_len(self, ids: list[int]) -> int:
        """Up to where the last assistant turn of a chat begins; 0 without chat markup."""
        for opened in (self._opening, list(self.markers.header)):
            size = len(opened)
            for index in range(len(ids) - size, -1, -1) if size else ():
                if ids[index : index + size] == opened:
                    behind = index + size
                    return behind + (ids[behind : behind + 1] == self._newline)
        return 0


class BlockLine(NamedTuple):
    """What became of one block. Its eviction is None where no query saw one; `kv_before` and
    `kv_after` are the KV tokens of the last query before the eviction point and of that at it."""

    block: Block
    eviction: Eviction | None
    kv_before: int | None
    kv_after: int | None

    @property
    def compression(self) -> float | None:
        """Memento tokens per block token."""
        tokens = self.block.block_tokens
        return self.block.summary_tokens / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Simulated:
    """One request under one `keep_last_n_blocks`. `steps`: queries that produced the output."""

    keep_last: int
    steps: int
    accounting: Accounting
    lines: tuple[BlockLine, ...]

    @property
    def average_kv_tokens(self) -> float:
        return self.accounting.kv_auc / max(1, self.steps)

    @property
    def average_kv_tokens_without(self) -> float:
        return self.accounting.kv_auc_without / max(1, self.steps)

    def as_dict(self) -> dict[str, Any]:
        averages = {
            "average_kv_tokens": self.average_kv_tokens,
            "average_kv_tokens_without": self.average_kv_tokens_without,
        }
        base = {"keep_last_n_blocks": self.keep_last, "steps": self.steps}
        return base | self.accounting.as_dict() | averages


def simulate(replayer: Replayer, tokens: Tokens, keep_last: int) -> Simulated:
    """Account for a request as if it had been served with `keep_last_n_blocks=keep_last`.

    Raises:
        ConfigError: `keep_last` contradicts the other options.
    """
    machine = replayer.machine(tokens, keep_last)
    length = len(tokens.ids)
    result = account(machine, tokens.prompt_len, length)
    steps = max(length - max(tokens.prompt_len, 1), 0)
    return Simulated(keep_last, steps, result, tuple(block_lines(machine, length)))


def block_lines(machine: BlockMachine, length: int) -> list[BlockLine]:
    """Every complete block, with the eviction that a query has seen and the KV around it."""
    seen = [eviction for eviction in machine.evictions if eviction.point < length - 1]
    held = kv_curve(seen, length)
    lines = []
    for block in machine.blocks:
        span = (block.start, block.start + 1)  # with and without its markers
        found = next((eviction for eviction in seen if eviction.start in span), None)
        before = held[found.point - 1] if found else None
        after = held[found.point] if found else None
        lines.append(BlockLine(block, found, before, after))
    return lines


@dataclass(slots=True)
class Totals:
    """Sums over requests under one `keep_last_n_blocks`. Units: tokens, token-steps."""

    keep_last: int
    requests: int = 0
    tokens: int = 0
    steps: int = 0
    blocks: int = 0
    block_tokens: int = 0
    memento_tokens: int = 0
    evicted_tokens: int = 0
    recomputed_tokens: int = 0
    peak: int = 0
    peak_without: int = 0
    largest_peak: int = 0
    largest_peak_without: int = 0
    auc: int = 0
    auc_without: int = 0

    def add(self, tokens: Tokens, result: Simulated) -> None:
        record = result.accounting
        self.requests += 1
        self.tokens += len(tokens.ids)
        self.steps += result.steps
        self.blocks += record.blocks
        self.block_tokens += sum(record.block_tokens)
        self.memento_tokens += sum(record.summary_tokens)
        self.evicted_tokens += record.evicted_tokens
        self.recomputed_tokens += record.recomputed_tokens
        self.peak += record.peak_kv_tokens
        self.peak_without += record.peak_kv_tokens_without
        self.largest_peak = max(self.largest_peak, record.peak_kv_tokens)
        self.largest_peak_without = max(self.largest_peak_without, record.peak_kv_tokens_without)
        self.auc += record.kv_auc
        self.auc_without += record.kv_auc_without

    def as_dict(self) -> dict[str, Any]:
        """Sums, with means per request (`peak`) and per step (`average_kv_tokens`)."""
        requests, steps = max(1, self.requests), max(1, self.steps)
        return {
            "keep_last_n_blocks": self.keep_last,
            "requests": self.requests,
            "tokens": self.tokens,
            "steps": self.steps,
            "blocks": self.blocks,
            "block_tokens": self.block_tokens,
            "summary_tokens": self.memento_tokens,
            "compression": self.memento_tokens / self.block_tokens if self.block_tokens else None,
            "evicted_tokens": self.evicted_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "mean_peak_kv_tokens": self.peak / requests,
            "mean_peak_kv_tokens_without": self.peak_without / requests,
            "peak_kv_tokens": self.largest_peak,
            "peak_kv_tokens_without": self.largest_peak_without,
            "average_kv_tokens": self.auc / steps,
            "average_kv_tokens_without": self.auc_without / steps,
            "kv_auc": self.auc,
            "kv_auc_without": self.auc_without,
        }
