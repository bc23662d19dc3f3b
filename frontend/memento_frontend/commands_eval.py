"""`memento eval`: questions with answers, several ways of asking side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from memento_frontend import cli_options as o
from memento_sgl.address import DEFAULT_URL
from memento_sgl.exit_codes import as_exit_code

HELP = """Grade a server on questions with answers, with eviction on and off side by side.

QUESTIONS is JSONL or Parquet with the columns of AIME, MATH-500, GSM8K or GPQA, or `question`,
`answer` and perhaps `choices`. Every attempt is written to --out as it comes; ended early (Ctrl-C,
kill, server gone), the same command goes on. Mathematics is compared by math-verify (extra `eval`).

    memento eval aime.parquet --out aime.jsonl --samples 64

    memento eval gpqa.parquet --out gpqa.jsonl --samples 2 --arm on

    memento eval math.jsonl --out answers.jsonl --arm on --arm restart@http://127.0.0.1:30001

An arm is a way of asking: `on` as the server is, `off` without eviction, NAME@URL another server
(--memento-restart-mode, another checkpoint), NAME{"keep_last_n_blocks": 1} options of the request.
The sampling defaults are the paper's: temperature 0.6, top-p 0.95, top-k 20, 32,768 tokens.

Exit code: 0 done, 1 the server cannot be used, 2 usage, 3 some requests failed, 5 stopped early,
6 the output is in use, damaged or made with other settings, 130 interrupted.
"""
SAMPLING = "Sampling (default: the paper's)"


def evaluate(
    questions: Annotated[Path, Argument(metavar="QUESTIONS", help="JSONL or Parquet.")],
    out: Annotated[Path, Option("--out", "-o", help="Attempts, JSONL; summaries go beside it.")],
    samples: Annotated[int, Option("--samples", "-n", help="Per question and arm.", min=1)] = 1,
    arms: Annotated[
        list[str] | None, Option("--arm", help="on, off, NAME@URL, NAME{json}. Default: on, off.")
    ] = None,
    kind: Annotated[
        str, Option("--kind", help="How answers compare: auto, math, choice, text.")
    ] = "auto",
    instruction: Annotated[
        str | None, Option("--instruction", help="Behind each question; default by kind.")
    ] = None,
    seed: Annotated[int, Option("--seed", help="Of shuffled options and the bootstrap.")] = 0,
    html: Annotated[Path | None, Option("--html", help="Also write this page.")] = None,
    base_url: o.BaseUrl = DEFAULT_URL,
    model: Annotated[
        str | None, Option("--model", help="Default: the only one.", rich_help_panel=o.SERVER)
    ] = None,
    api_key_env: o.KeyEnv = None,
    concurrency: Annotated[
        int, Option("--concurrency", help="Requests at once.", min=1, rich_help_panel=o.SERVER)
    ] = 16,
    temperature: Annotated[
        float, Option("--temperature", min=0.0, rich_help_panel=o.SAMPLING)
    ] = 0.6,
    top_p: Annotated[float, Option("--top-p", min=0.0, max=1.0, rich_help_panel=o.SAMPLING)] = 0.95,
    top_k: Annotated[
        int, Option("--top-k", help="0: not sent.", min=0, rich_help_panel=o.SAMPLING)
    ] = 20,
    max_tokens: Annotated[
        int, Option("--max-tokens", help="Thought and answer.", min=1, rich_help_panel=o.SAMPLING)
    ] = 32768,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Ask those again.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    values = dict(locals())
    raise typer.Exit(as_exit_code(lambda: _evaluate(values), "give the same command to go on"))


def _evaluate(values: dict[str, Any]) -> int:
    import json

    from rich.console import Console

    from memento_frontend.evaluation.questions import read_questions
    from memento_frontend.evaluation.run import Arm, EvalSettings, evaluate
    from memento_frontend.evaluation.tables import page, table

    questions = read_questions(
        values["questions"],
        kind=values["kind"],
        seed=values["seed"],
        instruction=values["instruction"],
    )
    settings = EvalSettings(
        arms=[Arm.parse(text, values["base_url"]) for text in values["arms"] or ("on", "off")],
        key_env=values["api_key_env"],
        top_k=values["top_k"] or None,
        **{
            name: values[name]
            for name in (
                "samples", "model", "temperature", "top_p", "max_tokens", "seed", "concurrency",
            )
        },
    )  # fmt: skip
    out = values["out"]
    found = evaluate(
        questions,
        out,
        settings,
        retry_failed=values["retry_failed"],
        progress=not values["quiet"],
    )
    summary = out.with_name(f"{out.name}.summary.json")
    summary.write_text(
        json.dumps({name: arm.as_dict() for name, arm in found.items()}, indent=1) + "\n",
        encoding="utf-8",
    )
    title = f"{values['questions'].name}, {settings.samples} samples"
    if values["html"] is not None:
        values["html"].write_text(page(title, found, settings.samples), encoding="utf-8")
    if not values["quiet"]:
        Console().print(table(found, settings.samples))
        print(f"attempts: {out}, figures: {summary}")
    return 3 if any(arm.failed for arm in found.values()) else 0


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("eval", help=HELP, rich_help_panel="Ask")(evaluate)
