"""The prompts: templates, what is put into them, and their fingerprint.

All calls have the same system message, and all questions about one trace start with the same text:
the problem and the trace, its cuts numbered, as far as the question needs it. What differs, the
task and its rules, comes last. So a provider's or server's prefix cache has read the trace when the
second question comes: the first windows of grades, the proposal and the review share their start.

Text of traces and of LLMs stands between tags that end in a nonce: a hash of the very trace, which
that cannot contain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from memento_pipeline.llm.answers import judgements_schema, neutralise, scores_schema
from memento_pipeline.llm.wire import Prompt
from memento_pipeline.records import Sentences
from memento_sgl.templates import template_path

TEMPLATES = (
    *("system.jinja", "score.jinja", "summarize.jinja", "review.jinja", "judge.jinja"),
    *("refine.jinja", "_view.jinja", "_rules.jinja", "_grading.jinja", "_judgements.jinja"),
    *("_form.jinja", "_listed.jinja", "_candidates.jinja", "_note.jinja"),
)


# From these follows how long an answer can sensibly be; a model counts other tokens than we do, and
# one that repeats itself would go on until its context is full.
TOKENS_PER_GRADE = 16
TOKENS_PER_JUDGEMENT = 400
TOKENS_AROUND = 100
LEEWAY = 4  # times the length that a memento should have at most


class BlockView(NamedTuple):
    """A block as a prompt shows it; texts as they are in the trace."""

    number: int  # from 1
    text: str
    where: str = ""  # its cuts, where the whole trace is shown
    least: int = 0  # tokens that its memento should have
    most: int = 0
    candidate: str = ""
    feedback: str = ""


def template_folder() -> Path:
    """Where the prompts are: all lie beside the first."""
    return template_path(TEMPLATES[0]).parent


def fingerprint(names: Sequence[str] = TEMPLATES, folder: Path | None = None) -> str:
    """Hash of templates: part of the settings, so that prompts are never mixed within a folder."""
    folder = folder or template_folder()
    digest = hashlib.sha256()
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(template_folder())
    # Prompts are not HTML: nothing is escaped here, `neutralise` does what prompts need.
    return Environment(loader=loader, undefined=StrictUndefined, auto_reload=False)


def _render(name: str, values: Mapping[str, Any]) -> str:
    return _environment().get_template(name).render(values).strip()


@cache
def system_prompt() -> str:
    """The system message, one for all stages: it stands before what they share."""
    return _render("system.jinja", {})


def nonce_for(*texts: str) -> str:
    """Six hexadecimal digits that occur in none of the texts; the same for the same texts."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    while any(digest[:6] in text for text in texts):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest[:6]


def score_prompt(
    trace_id: str,
    thought: str,
    sentences: Sentences,
    boundaries: Sequence[int],
    *,
    problem: str = "",
    note: str = "",
    attempt: int = 0,
) -> Prompt:
    """Ask for the grades of `boundaries` (rising). Shows the text from the last candidate before
    the first to the next one after the last; other boundaries in between carry no mark."""
    candidates = [-1, *sentences.candidates, len(sentences) - 1]
    first = max(c for c in candidates if c < boundaries[0]) + 1
    last = min(c for c in candidates if c > boundaries[-1])
    values = {
        "nonce": nonce_for(problem, thought),
        "problem": neutralise(problem),
        "excerpt": marked(thought, sentences, boundaries, first, last),
        "numbers": f"{boundaries[0]} to {boundaries[-1]}",
        "count": len(boundaries),
        "note": note,
    }
    user = _render("score.jinja", values)
    limit = TOKENS_AROUND + len(boundaries) * TOKENS_PER_GRADE
    schema = scores_schema(boundaries)
    return Prompt(trace_id, "score", system_prompt(), user, schema, attempt, limit)


def marked(thought: str, sentences: Sentences, marks: Sequence[int], first: int, last: int) -> str:
    """Sentences `first..last`, with ⟦b⟧ at each boundary b of `marks` (rising) among them."""
    pieces: list[str] = []
    start = sentences.edges[first]
    for boundary in marks:
        if first <= boundary < last:
            edge = sentences.edges[boundary + 1]
            pieces.append(_marked(neutralise(thought[start:edge]), boundary))
            start = edge
    pieces.append(neutralise(thought[start : sentences.edges[last + 1]]))
    return "".join(pieces).strip("\n")


def _marked(piece: str, boundary: int) -> str:
    """The mark goes before the white space at the end of the piece, where a reader expects it."""
    body = piece.rstrip()
    return f"{body}⟦{boundary}⟧{piece[len(body) :]}"


def memento_prompt(
    stage: str,
    trace_id: str,
    problem: str,
    shown: Sequence[BlockView],
    asked: Sequence[BlockView],
    *,
    nonce: str,
    excerpt: str = "",
    threshold: float = 0.0,
    note: str = "",
    attempt: int = 0,
) -> Prompt:
    """Ask to `summarize`, `review` (grade and improve), `judge` or `refine` the blocks `asked`.

    Args:
        shown: the blocks in view, each between tags of its own; not used with `excerpt`.
        excerpt: the trace in one piece with its cuts marked, as the questions for grades show it.
        threshold: a review improves what it grades below.
    """
    values = {
        "nonce": nonce,
        "problem": neutralise(problem),
        "excerpt": excerpt,
        "shown": [_neutral(block) for block in shown],
        "asked": [_neutral(block) for block in asked],
        "threshold": f"{threshold:g}",
        "note": note,
    }
    user = _render(f"{stage}.jinja", values)
    schema = judgements_schema([block.number for block in asked]) if stage == "judge" else None
    return Prompt(trace_id, stage, system_prompt(), user, schema, attempt, _limit(stage, asked))


def _limit(stage: str, asked: Sequence[BlockView]) -> int:
    judgements = TOKENS_PER_JUDGEMENT * len(asked) if stage in ("judge", "review") else 0
    mementos = sum(LEEWAY * block.most + TOKENS_AROUND for block in asked)
    return TOKENS_AROUND + judgements + (0 if stage == "judge" else mementos)


def _neutral(block: BlockView) -> BlockView:
    return block._replace(
        text=neutralise(block.text).strip("\n"),
        candidate=neutralise(block.candidate),
        feedback=neutralise(block.feedback),
    )
