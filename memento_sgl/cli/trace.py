"""`memento trace`: look at trace files, or turn them into a timeline for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memento_sgl.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from memento_sgl.observe.trace.schema import RequestTrace

UNUSABLE = 2
NARROW = 80  # columns below which there is no room for the table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(trace)


def trace(
    files: Annotated[
        list[Path], typer.Argument(help="Trace files, or folders: then all *.json in them.")
    ],
    chrome: Annotated[
        Path | None,
        typer.Option(help="Write a timeline for https://ui.perfetto.dev or chrome://tracing here."),
    ] = None,
) -> None:
    """Show per-request trace files of a server started with --memento-trace-dir.

    memento trace traces/

    memento trace traces/*.json --chrome timeline.json
    """
    from rich.console import Console

    from memento_sgl.observe.trace.schema import read_trace

    try:
        traces = [read_trace(path) for path in _listed(files)]
        if chrome is not None:
            _write(chrome, traces)
    except DataError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        raise typer.Exit(UNUSABLE) from None
    console = Console(highlight=False)
    if console.width < NARROW:
        for item in traces:
            console.print(_words(item), markup=False)
    else:
        console.print(_table(traces))


def _listed(paths: list[Path]) -> list[Path]:
    found = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} holds no trace files")
        found += inside
    return found


def _write(path: Path, traces: list[RequestTrace]) -> None:
    from memento_sgl.observe.trace.export import chrome_trace

    try:
        path.write_text(json.dumps(chrome_trace(traces)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
    print(f"{len(traces)} request(s) in {path}")


def _table(traces: list[RequestTrace]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("request", overflow="fold", min_width=10)
    table.add_column("finish", no_wrap=True)
    for title in ("prompt", "output", "blocks", "evicted", "peak KV", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    for item in traces:
        sums = item.accounting
        table.add_row(
            escape(item.id),
            escape(item.finish),
            str(item.tokens.prompt),
            str(item.tokens.output),
            str(sums["blocks"]),
            str(sums["evicted_tokens"]),
            f"{sums['peak_kv_tokens']} of {sums['peak_kv_tokens_without']}",
            f"{item.times.end:.3f}",
        )
    return table


def _words(item: RequestTrace) -> str:
    sums = item.accounting
    return (
        f"{item.id}\n  {item.finish}, {item.tokens.prompt} + {item.tokens.output} tokens in "
        f"{item.times.end:.3f} s, {sums['blocks']} blocks, {sums['evicted_tokens']} tokens "
        f"evicted, peak KV {sums['peak_kv_tokens']} of {sums['peak_kv_tokens_without']}"
    )
