"""`memento simulate` and `memento view`: traces of any kind, offline, without torch or SGLang."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from memento_sgl.demo import MODEL_DIR
from memento_sgl.errors import ConfigError, DataError, MementoError
from memento_sgl.offline.simulate.model_shape import ELEMENT_BYTES, SHAPES, ModelShape, load_shape

if TYPE_CHECKING:  # the rest is imported when a command runs: see cli.py
    from memento_sgl.offline.inputs.files import BadRow
    from memento_sgl.offline.inputs.formats import Trace
    from memento_sgl.offline.simulate.replay import Replayer
    from memento_sgl.rule.config import MementoConfig

USAGE, BAD_ROWS = 2, 3  # exit codes, those of the pipeline
MOST_SHOWN = 12  # a page with more requests is no page any more

KINDS_HELP = """Files may hold plain text, or JSON, JSON lines or Parquet with any of:
rollout record, trace file, /generate answer, OpenAI answer, memento think answer, memento batch
result, token ids, tokenized row, training row, chat text, lists of token ids. A folder stands for
the files in it, the work folder of `memento convert` for its rows, - for standard input."""

SIMULATE_HELP = f"""Replay traces offline: what they would hold in KV, with and without eviction.

The figures are those the server's own accounting gives for the same tokens. {KINDS_HELP}

    memento simulate trace.txt --tokenizer ./qwen3-memento --model qwen3-8b

    memento simulate work --tokenizer ./qwen3-memento --keep-last-n-blocks 0,1,2,-1

    memento simulate rollouts.jsonl --json | tail -1

Exit code: 0 all rows were replayed, 2 it cannot be done, 3 some rows are no traces, or none is.
"""

VIEW_HELP = f"""Draw traces: one HTML page with foldable blocks beside the KV curve.

The page needs no network. Where a file has the spans that were evicted, those are shown, else what
the rule gives. {KINDS_HELP}

    memento view answer.json --tokenizer ./qwen3-memento --open

    memento view work --limit 4 --out page.html

Exit code: 0 written, 2 it cannot be done, 3 written without some rows that are no traces, or
nothing to show.
"""

Inputs = Annotated[list[Path], Argument(metavar="FILE...", help="Files, folders or -.")]
TokenizerPath = Annotated[
    Path | None,
    Option("--tokenizer", help="tokenizer.json or its folder. Default: the embedded model's."),
]
Model = Annotated[
    str | None,
    Option(
        "--model",
        help=f"Also in bytes, for {', '.join(SHAPES)}, a folder or config.json. "
        "Text needs --tokenizer for that.",
    ),
]
KvDtype = Annotated[
    str | None,
    Option("--kv-dtype", help=f"Of the KV cache: {', '.join(ELEMENT_BYTES)}. Default: the model's"),
]
Delimiters = Annotated[
    bool | None,
    Option(
        "--mask-delimiters/--no-mask-delimiters",
        help="Evict the block's two markers too. Default: by --model's family, else not.",
    ),
]
Config = Annotated[
    str | None, Option("--memento-config", help="More options, as for the server: JSON or a path.")
]


def run_simulate(
    inputs: Inputs,
    keep_last_n_blocks: Annotated[
        str | None,
        Option("--keep-last-n-blocks", help="One or more, with commas. Default: 0."),
    ] = None,
    tokenizer: TokenizerPath = None,
    model: Model = None,
    kv_dtype: KvDtype = None,
    mask_delimiters: Delimiters = None,
    memento_config: Config = None,
    limit: Annotated[int | None, Option("--limit", help="Rows to read, at most.", min=1)] = None,
    blocks: Annotated[bool, Option("--blocks", help="Also a table of every request.")] = False,
    as_json: Annotated[
        bool, Option("--json", help="One JSON object per request, per bad row and for the sums.")
    ] = False,
) -> None:
    from memento_sgl.offline.simulate import tables as show
    from memento_sgl.offline.simulate.replay import Totals, simulate

    with _errors():
        shape = _shape(model, kv_dtype)
        replayer = _replayer(tokenizer, shape, mask_delimiters, memento_config)
        keeps = _keeps(keep_last_n_blocks, replayer.config)
        by_characters = _by_characters(tokenizer, model)
        totals = [Totals(keep) for keep in keeps]
        name = _counted_by(replayer, by_characters)
        out = show.Lines(name, shape) if as_json else show.Tables(name, shape, blocks)

        def one(trace: Trace) -> None:
            if by_characters and trace.is_text:
                out.no_bytes()
            tokens = replayer.tokens(trace)
            results = [simulate(replayer, tokens, keep) for keep in keeps]
            for total, result in zip(totals, results, strict=True):
                total.add(tokens, result)
            out.request(trace.name, tokens, results)

        bad = _each(inputs, limit, one, out.bad_row)
        out.sums(totals, bad)
    raise typer.Exit(BAD_ROWS if bad or not totals[0].requests else 0)


def run_view(
    inputs: Inputs,
    out: Annotated[Path, Option("--out", "-o", help="The page.")] = Path("memento-view.html"),
    keep_last_n_blocks: Annotated[
        int | None, Option("--keep-last-n-blocks", help="Where a file does not tell.")
    ] = None,
    tokenizer: TokenizerPath = None,
    model: Model = None,
    kv_dtype: KvDtype = None,
    mask_delimiters: Delimiters = None,
    memento_config: Config = None,
    limit: Annotated[int, Option("--limit", help="Rows to read, at most.", min=1)] = MOST_SHOWN,
    open_: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from memento_sgl.offline.simulate import tables as show
    from memento_sgl.offline.view.page import Page, drawn

    console = Console(soft_wrap=True, highlight=False)
    with _errors():
        shape = _shape(model, kv_dtype)
        replayer = _replayer(tokenizer, shape, mask_delimiters, memento_config)
        by_characters = _by_characters(tokenizer, model)
        page = Page(_counted_by(replayer, by_characters), shape)

        def one(trace: Trace) -> None:
            if by_characters and trace.is_text:
                page.no_bytes()
            page.add(drawn(trace, replayer, keep_last_n_blocks))

        bad = _each(inputs, limit, one, lambda row: show.bad_row(console, row))
        if page.requests:
            page.write(out)
    if not page.requests:
        console.print("nothing to show")
        raise typer.Exit(BAD_ROWS)
    console.print(f"wrote {escape(str(out))}: {len(page.requests)} requests")
    if open_:
        webbrowser.open(out.resolve().as_uri())
    raise typer.Exit(BAD_ROWS if bad else 0)


def _each(
    inputs: Sequence[Path],
    limit: int | None,
    use: Callable[[Trace], None],
    report: Callable[[BadRow], None],
) -> int:
    """Give every trace to `use`, every bad row to `report`; returns how many were bad."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from memento_sgl.offline.inputs.files import BadRow, count_rows, list_trace_files, read_traces

    files = list_trace_files(inputs)
    total = count_rows(files)
    bad = 0
    progress = Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.disable = not progress.console.is_terminal or total == 1
    with progress:
        task = progress.add_task("", total=total if limit is None else min(total or limit, limit))
        for row in islice(read_traces(files), limit):
            wrong = row if isinstance(row, BadRow) else _used(row, use)
            if wrong is not None:
                bad += 1
                report(wrong)
            progress.advance(task)
    return bad


def _used(trace: Trace, use: Callable[[Trace], None]) -> BadRow | None:
    from memento_sgl.offline.inputs.files import BadRow

    try:
        use(trace)
    except DataError as error:
        return BadRow(trace.name, 0, str(error))
    return None


def _replayer(
    tokenizer: Path | None,
    shape: ModelShape | None,
    mask_delimiters: bool | None,
    memento_config: str | None,
) -> Replayer:
    from memento_sgl.offline.inputs.tokens import TextTokenizer
    from memento_sgl.offline.simulate.replay import Replayer
    from memento_sgl.rule.config import MementoConfig

    config = MementoConfig.parse(memento_config) if memento_config else MementoConfig()
    changes: dict[str, bool] = {"enable": True}
    if mask_delimiters is not None:
        changes["mask_delimiters"] = mask_delimiters
    elif shape is None and config.mask_delimiters == "auto":
        changes["mask_delimiters"] = False
    config = config.model_copy(update=changes)
    settled = config.for_family(list(shape.architectures) if shape else [])
    return Replayer(TextTokenizer(tokenizer or MODEL_DIR), settled)


def _by_characters(tokenizer: Path | None, model: str | None) -> bool:
    """Whether text is counted by the embedded model's tokenizer for want of another one: bytes of
    a model would then be those of characters."""
    return tokenizer is None and not (model and Path(model).resolve() == MODEL_DIR.resolve())


def _counted_by(replayer: Replayer, by_characters: bool) -> str:
    return replayer.tokenizer.name + (" (one per character)" if by_characters else "")


def _keeps(text: str | None, config: MementoConfig) -> list[int]:
    if text is None:
        return [config.keep_last_n_blocks]
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(
            f"--keep-last-n-blocks {text!r}: give numbers with commas, such as 0,1,-1"
        ) from None


def _shape(model: str | None, kv_dtype: str | None) -> ModelShape | None:
    if model is not None:
        return load_shape(model, kv_dtype)
    if kv_dtype is not None:
        raise ConfigError("--kv-dtype needs --model, whose bytes it is about")
    return None


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (MementoError, OSError) as error:
        from memento_sgl.offline.simulate.tables import problem

        problem(str(error))
        raise typer.Exit(USAGE) from None


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    panel = "Traces, offline"
    app.command("simulate", help=SIMULATE_HELP, rich_help_panel=panel)(run_simulate)
    app.command("view", help=VIEW_HELP, rich_help_panel=panel)(run_view)
