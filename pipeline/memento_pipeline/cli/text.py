"""`memento validate`, `memento report` and `memento init-model`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

VALIDATE_HELP = """Check training rows: whole blocks, each with its memento, nothing stray.

Knows the shapes that `memento convert` writes and OpenMementos has: problem and response, the same
with sentences, blocks and block_summaries, chat text and messages, token ids with spans. Says
which row of which file is wrong and why. Of a work folder the row files are checked, not its logs.
A trace counts once, however many files have it, and is valid if all its rows are.

    memento validate work

    memento validate train.parquet more/*.jsonl

    memento validate --quiet train.jsonl && python train.py

Exit code: 0 every row is valid, 2 a path or file cannot be read, 3 some rows are not valid, or
there are none.
"""

REPORT_HELP = """Draw what a work folder holds: one HTML file that needs no network.

Sizes, compression, judge scores before and after refinement, what was left out and why, and cost,
beside the published figures; and single traces with their blocks, mementos and judge history.
The figures cover all finished traces; the browser holds a sample of them.

    memento report work

    memento report work --traces 200 --out report.html

Exit code: 0 written, 2 nothing to show, 6 the folder is in use, damaged or no work folder.
"""

INIT_HELP = """Give a Hugging Face checkpoint what `memento serve` asks for, ready for fine-tuning.

Adds the tokens that the tokenizer lacks: the four markers, <think> and </think>, and with a
template of this project <|im_start|> and <|im_end|>. They go into tokenizer.json itself; a
tokenizer that loses text is refused. Input rows, and output rows where they are not tied, start as
the mean of the rows of the words in the token's name, with noise N(0, 0.01). All other weights are
copied as they are, one shard at a time. DST must not exist or be empty; SRC is never changed.
Needs the extra `hf`.

    memento init-model Qwen3-8B Qwen3-8B-Memento

    memento init-model ./llama ./llama-memento --chat-template memento --seed 7

    memento init-model ./llama ./llama-memento --chat-template ./llama   # keep its own template

Exit code: 0 written, 2 it cannot be done (the message says why).
"""

MOST_PROBLEMS = 20

Quiet = Annotated[bool, Option("--quiet", "-q", help="Only the exit code.")]


def validate(
    paths: Annotated[list[Path], Argument(metavar="FILE...", help="Files or folders of rows.")],
    most: Annotated[int, Option("--most", help="Problems to print.", min=0)] = MOST_PROBLEMS,
    quiet: Quiet = False,
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from memento_pipeline.cli.execute import exit_codes
    from memento_pipeline.output.validate import validate_files
    from memento_pipeline.run.convert import Exit

    console = Console(soft_wrap=True, highlight=False)
    shown = 0
    traces: Counter[Path] = Counter()
    rows: Counter[Path] = Counter()
    wrong: set[tuple[Path, int]] = set()
    with exit_codes():
        for report in validate_files(paths):
            rows[report.file] += 1
            traces[report.group] = max(traces[report.group], rows[report.file])
            if report.problems:
                wrong.add((report.group, report.row))
            for problem in report.problems:
                shown += 1
                if not quiet and shown <= most:
                    console.print(f"{escape(str(report.file))}:{report.row}: {escape(problem)}")
    if not quiet:
        if shown > most:
            console.print(f"... and {shown - most:,} more problems: see --most")
        total, written = traces.total(), rows.total()
        what = "rows are valid" if total == written else f"traces are valid, in {written:,} rows"
        console.print(f"{total - len(wrong):,} of {total:,} {what}" if total else "no rows")
    raise typer.Exit(Exit.FAILED if wrong or not traces else Exit.OK)


def report(
    folder: Annotated[Path, Argument(metavar="DIR", help="What `memento convert --out` made.")],
    traces: Annotated[int, Option("--traces", help="Traces to browse, at most.", min=0)] = 50,
    out: Annotated[Path | None, Option("--out", "-o", help="Default: DIR/report.html.")] = None,
    facts: Annotated[
        Path | None,
        Option("--facts", help='JSONL of {"id", "facts"}: how many the mementos keep.'),
    ] = None,
    quiet: Quiet = False,
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from memento_pipeline.cli.execute import exit_codes
    from memento_pipeline.report.page import write_report

    with exit_codes():
        path = write_report(folder, out or folder / "report.html", traces, facts)
    if not quiet:
        Console(soft_wrap=True, highlight=False).print(f"wrote {escape(str(path))}")


def init_model(
    source: Annotated[Path, Argument(metavar="SRC", help="Checkpoint folder.")],
    target: Annotated[Path, Argument(metavar="DST", help="New or empty folder.")],
    template: Annotated[
        str,
        Option("--chat-template", help="memento_nosys, memento, or a file or folder that has one."),
    ] = "memento_nosys",
    mask_delimiters: Annotated[
        bool | None,
        Option(
            "--mask-delimiters/--no-mask-delimiters",
            help="Evict the block's two markers too. Default: by the model's family, else not; "
            "config.json tells `memento serve`.",
        ),
    ] = None,
    seed: Annotated[int, Option("--seed", help="Of the noise.", min=0)] = 0,
    noise: Annotated[float, Option("--noise", help="Standard deviation.", min=0.0)] = 0.01,
    quiet: Quiet = False,
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from memento_pipeline.checkpoint.init_model import init_model as initialise
    from memento_pipeline.cli.execute import exit_codes

    with exit_codes():
        done = initialise(
            source,
            target,
            template=template,
            mask_delimiters=mask_delimiters,
            seed=seed,
            noise=noise,
        )
    if not quiet:
        console = Console(soft_wrap=True, highlight=False)
        for marker, token in done.token_ids.items():
            console.print(f"{token}  {marker}  mean of {', '.join(done.related[marker])}")
        console.print(done.summary)
        console.print(f"wrote {escape(str(target))}")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    panel = "Data pipeline"
    app.command(help=VALIDATE_HELP, rich_help_panel=panel)(validate)
    app.command(help=REPORT_HELP, rich_help_panel=panel)(report)
    app.command("init-model", help=INIT_HELP, rich_help_panel=panel)(init_model)
