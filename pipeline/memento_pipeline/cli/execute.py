"""What the commands do: options, store, run, files, words, exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from memento_pipeline.cli import words
from memento_pipeline.cli.build_options import build
from memento_pipeline.output.chat import load_template
from memento_pipeline.output.export import write_outputs
from memento_pipeline.output.tokenize import RowTokenizer
from memento_pipeline.read.rows import count_rows
from memento_pipeline.run.convert import Exit, rows, run_stages
from memento_pipeline.run.converted import converted
from memento_pipeline.run.merge import merge as merge_folders
from memento_pipeline.run.plan import plan
from memento_pipeline.run.run_options import RunOptions
from memento_pipeline.store.folder import FILE_NAME, Store, peek_note
from memento_pipeline.store.schema import STAGES
from memento_pipeline.text.tokens import load_counter
from memento_sgl.errors import ConfigError, DataError, MementoError, PipelineError, StoreError

console = Console(stderr=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors that are meant for the user become one line and an exit code."""
    try:
        yield
    except MementoError as error:
        words.problem(console, str(error))
        code = Exit.USAGE
        if isinstance(error, PipelineError):
            code = Exit.STORE if isinstance(error, StoreError) else Exit.STOPPED
        raise typer.Exit(code) from None
    except OSError as error:  # the disk, since endpoints have errors of their own
        words.problem(console, f"{error}. What is in the store is kept: repair it, then run again")
        raise typer.Exit(Exit.STOPPED) from None


def convert(values: Mapping[str, Any]) -> None:
    """`memento convert`."""
    with exit_codes():
        out: Path = values["out"]
        recorded = peek_note(out, "options") if values["resume"] else None
        options = build(values, recorded)
        if not options.inputs:
            raise ConfigError("no input: name files or folders, or go on with --resume")
        redo = _stage_names(values["redo"] or ())
        _check_files(options)
        if values["dry_run"]:
            _dry_run(options)
            return
        if values["ray"]:
            if redo or values["preview"]:
                raise ConfigError("--ray goes with neither --redo nor --preview")
            raise typer.Exit(_on_ray(options, values["ray"], values["retry_failed"]))
        raise typer.Exit(_convert(options, values, redo))


def _convert(options: RunOptions, values: Mapping[str, Any], redo: Sequence[str]) -> Exit:
    settings = options.settings(load_counter(options.tokenizer).name)
    preview: int | None = values["preview"]
    this_run = options.model_copy(update={"limit": preview}) if preview else options
    total = _total(this_run)
    # A shard may be empty, the input may not; some kinds of files tell only when they are read.
    unknown = total is None and options.shard.parts == 1
    if total == 0 or (unknown and next(iter(rows(this_run)), None) is None):
        named = ", ".join(str(path) for path in options.inputs)
        raise DataError(f"{named}: no rows, there is nothing to convert")
    with Store(options.out, settings, redo=redo) as store:
        store.note("options", options.model_dump_json())
        if values["retry_failed"]:
            store.retry_failed()
        outcome = run_stages(this_run, store, total=total, display=not values["quiet"])
        if preview:
            for trace in islice(converted(store), preview):
                words.preview(Console(), trace)
        if values["quiet"]:
            words.stopped(console, outcome)
        else:
            words.summary(console, outcome, store.folder)
        # After an early end files would look finished; `memento assemble` writes them if wanted.
        if not (preview or outcome.summary.stopped):
            files = _write(store, options)
            if set(outcome.counts) == {"rejected"}:
                where = store.folder / "rejected.jsonl"
                words.problem(console, f"no row is a trace: {where} has the reason of each")
            elif not values["quiet"]:
                words.files(console, files)
    return outcome.exit


def stage(name: str, values: Mapping[str, Any]) -> None:
    """One stage by itself; options that are not given are those the folder was started with."""
    with exit_codes():
        out: Path = values["out"]
        first = name == STAGES[0]
        resumed = not first or (out / FILE_NAME).exists()
        options = build(values, peek_note(out, "options") if resumed else None)
        if first and not options.inputs:
            raise ConfigError("no input: name files or folders")
        settings = {name: options.settings(load_counter(options.tokenizer).name)[name]}
        redo = [name] if values["redo"] else []
        total = _total(options) if first else None
        with Store(out, settings, create=first, redo=redo) as store:
            store.note("options", options.model_dump_json())
            quiet = values["quiet"]
            outcome = run_stages(options, store, stages=[name], total=total, display=not quiet)
            if quiet:
                words.stopped(console, outcome)
            else:
                words.summary(console, outcome, out)
        raise typer.Exit(outcome.exit)


def assemble(values: Mapping[str, Any]) -> None:
    """`memento assemble`; options that are not given are those the folder was started with."""
    out: Path = values["out"]
    with exit_codes(), Store(out, create=False) as store:
        options = build(values, store.noted("options"))
        store.note("options", options.model_dump_json())
        files = _write(store, options)
        if not values["quiet"]:
            words.files(console, files)


def merge(out: Path, folders: Sequence[Path], quiet: bool) -> None:
    """`memento merge`."""
    with exit_codes():
        counts = merge_folders(out, folders)
        with Store(out, create=False) as store:
            files = _write(store, build({"out": out}, store.noted("options")))
        if not quiet:
            words.counts(console, counts)
            words.files(console, files)


def _stage_names(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"--redo {name}: the stages are {', '.join(STAGES)}")
    return list(names)


def _total(options: RunOptions) -> int | None:
    total = count_rows(options.inputs, options.read, out=options.out)
    if options.limit is not None:
        total = options.limit if total is None else min(total, options.limit)
    return None if total is None else -(-total // options.shard.parts)


def _check_files(options: RunOptions) -> None:
    """Wrong names of templates and tokenizers are errors before anything is paid."""
    load_counter(options.tokenizer)
    template = load_template(options.export.chat_template, options.export.tokenizer)
    if options.export.tokenizer is not None:
        RowTokenizer(options.export.tokenizer, template, options.export.mask_delimiters)


def _dry_run(options: RunOptions) -> None:
    counter = load_counter(options.tokenizer)
    expected = plan(options, (row for _, row in rows(options)), counter)
    words.plan(Console(), expected, options, counter.name)


def _on_ray(options: RunOptions, shards: int, retry_failed: bool) -> Exit:
    from memento_pipeline.run.ray_convert import convert_on_ray

    codes = convert_on_ray(options, shards, retry_failed=retry_failed)
    with Store(options.out, create=False) as store:
        files = _write(store, options)
        words.counts(console, store.counts())
        words.files(console, files)
    worst = (Exit.INTERRUPTED, Exit.STOPPED, Exit.FAILED, Exit.FILTERED)
    return next((code for code in worst if code in codes), Exit.OK)


def _write(store: Store, options: RunOptions) -> list[Path]:
    return write_outputs(
        store.folder,
        converted(store),
        load_counter(options.tokenizer),
        options.export,
        options.rows,
        store.rejected(),
    )
