"""The figures of an evaluation for people: a table, and a page that is complete in itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table

from memento_frontend.evaluation.summary import ArmSummary, Figure
from memento_sgl.offline.view.html import render_page


class Row(NamedTuple):
    """One figure of all arms."""

    name: str
    cells: list[str]


def rows(summaries: Mapping[str, ArmSummary], samples: int) -> list[Row]:
    """What table and page show, a row per figure."""
    arms = list(summaries.values())

    def row(name: str, cells: list[str]) -> Row:
        return Row(name, cells)

    found = [row("pass@1", [_interval(arm.pass_at_1) for arm in arms])]
    if samples > 1:
        found.append(row(f"maj@{samples}", [_interval(arm.majority) for arm in arms]))
    found += [
        row("peak KV tokens", [_beside(arm.peak_kv, arm.peak_kv_without) for arm in arms]),
        row("KV token-steps", [_beside(arm.auc, arm.auc_without) for arm in arms]),
        row("output tokens", [_number(arm.tokens) for arm in arms]),
        row("blocks", [_number(arm.blocks, 1) for arm in arms]),
        row("tokens per block", [_number(arm.block_tokens, 1) for arm in arms]),
        row("tokens per memento", [_number(arm.memento_tokens, 1) for arm in arms]),
        row("well-formed", [_share(arm.well_formed) for arm in arms]),
        row("cut by length", [f"{arm.cut:,}" for arm in arms]),
        row("no readable answer", [f"{arm.unreadable:,}" for arm in arms]),
        row("attempts", [f"{arm.attempts:,}" for arm in arms]),
        row("failed requests", [f"{arm.failed:,}" for arm in arms]),
    ]
    return found


def table(summaries: Mapping[str, ArmSummary], samples: int) -> Table:
    """For the terminal."""
    found = Table()
    found.add_column("")
    for name in summaries:
        found.add_column(name, justify="right")
    for name, cells in rows(summaries, samples):
        found.add_row(name, *cells)
    return found


def page(title: str, summaries: Mapping[str, ArmSummary], samples: int) -> str:
    """One HTML file without network."""
    return render_page(
        "eval.html", title=title, arms=list(summaries), rows=rows(summaries, samples)
    )


def _interval(figure: Figure | None) -> str:
    if figure is None:
        return "unknown"
    return f"{figure.mean:.1%} ({figure.low:.1%} to {figure.high:.1%})"


def _beside(value: float | None, without: float | None) -> str:
    if value is None or not without:
        return "unknown"
    return f"{value:,.0f} ({value / without:.2f} of no eviction)"


def _number(value: float | None, digits: int = 0) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
