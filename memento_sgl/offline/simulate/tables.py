"""What `memento simulate` prints: tables for people, JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memento_sgl.offline.inputs.files import BadRow
from memento_sgl.offline.simulate.model_shape import ModelShape
from memento_sgl.offline.simulate.replay import Simulated, Tokens, Totals

MOST_BAD_ROWS = 20
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Lines:
    """One JSON object per line: `request`, `bad_row`, and at the end `sums`."""

    def __init__(self, tokenizer: str, shape: ModelShape | None) -> None:
        self._tokenizer = tokenizer
        self._shape = shape

    def no_bytes(self) -> None:
        """Tokens are characters: from here on no figure is given in bytes."""
        self._shape = None

    def request(self, name: str, tokens: Tokens, results: Sequence[Simulated]) -> None:
        about = {"request": name, "prompt_tokens": tokens.prompt_len, "tokens": len(tokens.ids)}
        self._print(about | {"runs": [self._with_bytes(result.as_dict()) for result in results]})

    def bad_row(self, row: BadRow) -> None:
        self._print({"bad_row": row.file, "row": row.row, "reason": row.reason})

    def sums(self, totals: Sequence[Totals], bad: int) -> None:
        runs = [self._with_bytes(total.as_dict()) for total in totals]
        model = asdict(self._shape) if self._shape else None
        about = {"bad_rows": bad, "model": model, "tokenizer": self._tokenizer}
        self._print({"sums": runs, **about})

    def _with_bytes(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Figures in KV tokens a second time, in bytes."""
        if self._shape is None:
            return figures
        names = [name for name in figures if "kv_tokens" in name]
        return figures | {
            name.replace("kv_tokens", "kv_bytes"): self._shape.kv_bytes(figures[name])
            for name in names
        }

    @staticmethod
    def _print(value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False))


class Tables:
    """A table of sums, and with `blocks` one of every request before it."""

    def __init__(self, tokenizer: str, shape: ModelShape | None, blocks: bool) -> None:
        self._tokenizer = tokenizer
        self._shape = shape
        self._blocks = blocks
        self._bad = 0
        self._characters = False
        self._console = Console(highlight=False)

    def request(self, name: str, tokens: Tokens, results: Sequence[Simulated]) -> None:
        for result in results if self._blocks else ():
            about = f"{len(tokens.ids):,} tokens, keep_last_n_blocks={result.keep_last}"
            self._console.print(self._block_table(f"{name}: {about}", result))

    def no_bytes(self) -> None:
        """Tokens are characters: from here on no figure is given in bytes."""
        self._characters |= self._shape is not None
        self._shape = None

    def bad_row(self, row: BadRow) -> None:
        self._bad += 1
        if self._bad <= MOST_BAD_ROWS:
            bad_row(self._console, row)

    def sums(self, totals: Sequence[Totals], bad: int) -> None:
        if bad > MOST_BAD_ROWS:
            self._console.print(f"... and {bad - MOST_BAD_ROWS:,} more rows that are no traces")
        if not totals[0].requests:
            self._console.print("no traces")
            return
        self._console.print(self._sum_table(totals))
        first = totals[0]
        ratio = _percent(first.memento_tokens, first.block_tokens)
        self._console.print(
            f"{first.requests:,} requests, {first.tokens:,} tokens of {escape(self._tokenizer)}, "
            f"{first.steps:,} generated; {first.blocks:,} blocks, mementos {ratio} of them"
            + (f"; {bad:,} rows are no traces" if bad else "")
        )
        if self._characters:
            self._console.print(
                "No bytes: tokens of text are characters here. Give the model's --tokenizer"
            )
        if self._shape is not None:
            per_token = size(self._shape.kv_bytes(1))
            self._console.print(f"KV of {escape(self._shape.name)}: {per_token} per token")

    def _sum_table(self, totals: Sequence[Totals]) -> Table:
        """One column per `keep_last_n_blocks`; ratios are to the column without eviction."""
        table = Table("KV held", title="With eviction and without", show_lines=True)
        table.add_column("without", justify="right")
        for total in totals:
            table.add_column(f"keep last {total.keep_last}", justify="right")
        runs = [total.as_dict() for total in totals]
        evicted = [f"{run['evicted_tokens']:,}" for run in runs]
        table.add_row("evicted tokens", "0", *evicted)
        rows = [("peak_kv_tokens", "peak"), ("average_kv_tokens", "average over steps")]
        if totals[0].requests > 1:
            rows = [("mean_peak_kv_tokens", "peak, mean"), ("peak_kv_tokens", "peak, largest")]
            rows.append(("average_kv_tokens", "average over steps"))
        for key, name in rows:
            without = runs[0][key + "_without"]
            cells = [self._kv(run[key], _ratio(run[key], without)) for run in runs]
            table.add_row(name, self._kv(without), *cells)
        area = runs[0]["kv_auc_without"]
        areas = [f"{run['kv_auc']:,} ({_ratio(run['kv_auc'], area)})" for run in runs]
        table.add_row("area, token-steps", f"{area:,}", *areas)
        return table

    def _block_table(self, title: str, result: Simulated) -> Table:
        table = Table(title=escape(title))
        for name in ("block", "tokens", "memento", "ratio", "span", "leaves at", "KV", "freed"):
            table.add_column(name, justify="right")
        for number, line in enumerate(result.lines, start=1):
            block, eviction = line.block, line.eviction
            cells = [f"{block.block_tokens:,}", f"{block.summary_tokens:,}"]
            cells.append(_percent(block.summary_tokens, block.block_tokens))
            if eviction is None:
                cells += ["", "stays", "", ""]
            else:
                cells += [f"{eviction.start}-{eviction.end}", f"{eviction.point}"]
                cells += [f"{line.kv_before:,} > {line.kv_after:,}", self._kv(eviction.tokens)]
            table.add_row(str(number), *cells)
        return table

    def _kv(self, tokens: float, ratio: str = "") -> str:
        count = f"{tokens:,.0f}" + (f" ({ratio})" if ratio else "")
        return count if self._shape is None else f"{count}\n{size(self._shape.kv_bytes(tokens))}"


def bad_row(console: Console, row: BadRow) -> None:
    place = f"{row.file}:{row.row}" if row.row else row.file
    console.print(f"[red]no trace[/] {escape(place)}: {escape(row.reason)}", soft_wrap=True)


def problem(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"[bold red]error[/] {escape(text)}"
    )


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.1f} {UNITS[unit]}" if unit else f"{count:,.0f} B"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if whole else ""


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
