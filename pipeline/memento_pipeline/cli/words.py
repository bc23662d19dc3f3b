"""Words and tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from memento_pipeline import RULES
from memento_pipeline.records import Converted
from memento_pipeline.run.convert import Outcome
from memento_pipeline.run.plan import Plan
from memento_pipeline.run.progress import duration
from memento_pipeline.run.run_options import RunOptions

MOST_REASONS = 8
LONGEST_REASON = 700  # characters: a server's words and a hint in one


def problem(console: Console, text: str) -> None:
    console.print(f"[bold red]error[/] {escape(text)}", highlight=False, soft_wrap=True)


def counts(console: Console, found: Mapping[str, int]) -> None:
    line = ", ".join(f"{name} {count}" for name, count in sorted(found.items()) if count)
    console.print(f"traces: {line or 'none'}", highlight=False)


def files(console: Console, paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(f"wrote {escape(str(path))}", highlight=False)


def summary(console: Console, outcome: Outcome, folder: Path) -> None:
    """How the run ended, and what to do next."""
    counts(console, outcome.counts)
    done = outcome.summary
    if not_ready := done.seen.get("not_ready"):
        problem(console, f"{not_ready} traces lack the stage before this one: run that first")
    for reason, count in done.reasons.most_common(MOST_REASONS):
        line = " ".join(reason.split())[:LONGEST_REASON]
        console.print(f"  {count} x {escape(line)}", highlight=False, soft_wrap=True)
    if (more := len(done.reasons) - MOST_REASONS) > 0:
        console.print(f"  and {more} other reasons: see {escape(str(folder))}/rejected.jsonl")
    for note in outcome.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    spent = outcome.spent
    if spent.answers:
        unknown = f" ({spent.unknown} answers without a usage report)" if spent.unknown else ""
        known = outcome.cached_tokens
        cached = "" if known is None else f" ({known:,} of them cached)"
        cost = f", ${spent.dollars:.4f}" if spent.dollars else ""  # without prices it is unknown
        console.print(
            f"calls {spent.answers}, tokens in {spent.prompt_tokens:,}{cached}, out "
            f"{spent.completion_tokens:,}{unknown}{cost}",
            highlight=False,
        )
    console.print(f"took {duration(done.seconds)}", highlight=False)
    stopped(console, outcome)
    if done.stopped:
        again = f"memento convert --out {folder} --resume"
        console.print(f"to resume: [bold]{escape(again)}[/]", highlight=False)
    elif outcome.counts.get("failed"):
        again = f"memento convert --out {folder} --resume --retry-failed"
        console.print(f"to try the failed ones again: [bold]{escape(again)}[/]", highlight=False)


def stopped(console: Console, outcome: Outcome) -> None:
    """In one line why the run ended early, if it did: said even when nothing else is."""
    if (why := outcome.summary.stopped) is not None:
        problem(console, " ".join(why.split()))


def plan(console: Console, expected: Plan, options: RunOptions, tokenizer: str) -> None:
    """What `--dry-run` found."""
    table = Table("expected", "", title=f"model {', '.join(options.models)}", highlight=False)
    table.add_row("traces", f"{expected.traces:,}")
    table.add_row("left out by filters", f"{expected.left_out:,}")
    table.add_row(f"thought tokens ({tokenizer})", f"{expected.thought_tokens:,}")
    if options.models != [RULES]:
        tokens = expected.prompt_tokens + expected.completion_tokens
        per_trace = expected.calls / max(1, expected.traces)
        table.add_row("calls", f"{expected.calls:,.0f} ({per_trace:.1f} a trace)")
        table.add_row("prompt tokens", f"{expected.prompt_tokens:,.0f}")
        table.add_row("answer tokens, without reasoning", f"{expected.completion_tokens:,.0f}")
        ratio = tokens / max(1, expected.thought_tokens)
        table.add_row("tokens per thought token", f"{ratio:.1f}")
        dollars = options.ask.dollars(
            round(expected.prompt_tokens), round(expected.completion_tokens)
        )
        cost = "unknown: give --price-in and --price-out"
        table.add_row("cost", cost if dollars is None else f"${dollars:,.2f}")
    console.print(table)


def preview(console: Console, trace: Converted) -> None:
    """One trace: its blocks' sizes and their mementos."""
    state = trace.status.value + (f": {trace.reason}" if trace.reason else "")
    console.rule(escape(f"{trace.trace.id}  {state}"))
    blocks = trace.segmentation.blocks if trace.segmentation else ()
    for number, block in enumerate(blocks, 1):
        text = block.text(trace.trace.thought).strip()
        shown = text if len(text) < 400 else f"{text[:200]}\n...\n{text[-200:]}"
        console.print(Panel(escape(shown), title=f"block {number}, {block.tokens} tokens"))
        if number <= len(trace.mementos):
            memento = trace.mementos[number - 1]
            score = "" if memento.judge_score is None else f", judged {memento.judge_score:g}"
            title = f"memento {number}, {memento.tokens} tokens{score}"
            console.print(Panel(escape(memento.text), title=title, style="green"))
