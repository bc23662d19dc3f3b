"""The prompts: templates, what is put into them, and their fingerprint.

Every call of a stage has the same system message, and all questions about one trace start with the
same text (problem and blocks), so that a server with a prefix cache computes both once. Text of
traces and of LLMs stands between tags that end in a nonce: a hash of that very text, which the text
cannot contain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from memento_pipeline.answers import judgements_schema, neutralise, scores_schema
from memento_pipeline.records import Sentences
from memento_pipeline.wire import Prompt
from memento_sgl.templates import template_path

TEMPLATES = (
    "score_system.jinja",
    "score.jinja",
    "memento_system.jinja",
    "_memento_blocks.jinja",
    "summarize.jinja",
    "judge.jinja",
    "refine.jinja",
)


class BlockView(NamedTuple):
    """A block as a prompt shows it; texts as they are in the trace."""

    number: int  # from 1
    text: str
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
def system_prompt(stage: str) -> str:
    """The system message of a stage: one for grading cuts, one for all that is about mementos."""
    return _render("score_system.jinja" if stage == "score" else "memento_system.jinja", {})


def nonce_for(*texts: str) -> str:
    """Sixteen hexadecimal digits that occur in none of the texts; the same for the same texts."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    while any(digest[:16] in text for text in texts):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest[:16]


def score_prompt(
    trace_id: str,
    thought: str,
    sentences: Sentences,
    boundaries: Sequence[int],
    *,
    note: str = "",
    attempt: int = 0,
) -> Prompt:
    """Ask for the grades of `boundaries` (rising). Shows the text from the last candidate before
    the first to the next one after the last; other boundaries in between carry no mark."""
    candidates = [-1, *sentences.candidates, len(sentences) - 1]
    first = max(c for c in candidates if c < boundaries[0]) + 1
    last = min(c for c in candidates if c > boundaries[-1])
    pieces: list[str] = []
    start = sentences.edges[first]
    for boundary in boundaries:
        edge = sentences.edges[boundary + 1]
        pieces.append(_marked(neutralise(thought[start:edge]), boundary))
        start = edge
    pieces.append(neutralise(thought[start : sentences.edges[last + 1]]))
    excerpt = "".join(pieces)
    values = {
        "nonce": nonce_for(excerpt),
        "excerpt": excerpt.strip("\n"),
        "numbers": ", ".join(map(str, boundaries)),
        "count": len(boundaries),
        "note": note,
    }
    user = _render("score.jinja", values)
    return Prompt(
        trace_id, "score", system_prompt("score"), user, scores_schema(boundaries), attempt
    )


def _marked(piece: str, boundary: int) -> str:
    """The mark goes before the white space at the end of the piece, where a reader expects it."""
    body = piece.rstrip()
    return f"{body} ⟦{boundary}⟧{piece[len(body) :]}"


def memento_prompt(
    stage: str,
    trace_id: str,
    problem: str,
    shown: Sequence[BlockView],
    asked: Sequence[BlockView],
    *,
    nonce: str,
    note: str = "",
    attempt: int = 0,
) -> Prompt:
    """Ask to `summarize`, `judge` or `refine` the blocks `asked`, with `shown` in view."""
    values = {
        "nonce": nonce,
        "problem": neutralise(problem),
        "shown": [_neutral(block) for block in shown],
        "asked": [_neutral(block) for block in asked],
        "numbers": ", ".join(str(block.number) for block in asked),
        "note": note,
    }
    user = _render(f"{stage}.jinja", values)
    numbers = [block.number for block in asked]
    schema = judgements_schema(numbers) if stage == "judge" else None
    return Prompt(trace_id, stage, system_prompt(stage), user, schema, attempt)


def _neutral(block: BlockView) -> BlockView:
    return block._replace(
        text=neutralise(block.text).strip("\n"),
        candidate=neutralise(block.candidate),
        feedback=neutralise(block.feedback),
    )
