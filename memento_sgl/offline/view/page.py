"""`memento view`: requests as one HTML page, text beside the KV curve.

Everything the page shows is computed here; the script only draws. A token's place in the text is
given by the sizes of all tokens before it, so that curve and text are linked token by token while
the page has one element per part of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from memento_sgl.offline.inputs.formats import Trace
from memento_sgl.offline.simulate.model_shape import ModelShape
from memento_sgl.offline.simulate.replay import Replayer, block_lines
from memento_sgl.offline.simulate.tables import size
from memento_sgl.offline.view.html import embedded, render_page, verbatim
from memento_sgl.rule.accounting import account, kv_curve
from memento_sgl.rule.machine import Block, Eviction

"""Requests on a page unless asked for more."""


class Part(NamedTuple):
    """Tokens `[start, end)` of one kind: prompt, text, marker, block or memento.

    `block` and `eviction` are numbers in the lists of the request; None: of none.
    """

    kind: str
    start: int
    end: int
    block: int | None
    eviction: int | None


class Page:
    """Collects requests and writes the page."""

    def __init__(self, tokenizer: str, shape: ModelShape | None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._tokenizer = tokenizer
        self._shape = shape

    def no_bytes(self) -> None:
        """Tokens are characters: no figure is given in bytes."""
        self._shape = None

    def add(self, request: dict[str, Any]) -> None:
        self.requests.append(request)

    def render(self) -> str:
        shape = self._shape
        about = f"tokens of {self._tokenizer}"
        if shape is not None:
            about += f"; {size(shape.kv_bytes(1))} of KV per token in {shape.name}"
        names = [request["name"] for request in self.requests]
        data = {"requests": self.requests, "tokenBytes": shape.kv_bytes(1) if shape else None}
        title = names[0] if len(names) == 1 else f"{len(names)} requests"
        return page_of(title=title, about=about, data=embedded(data))

    def write(self, path: Path) -> None:
        path.write_text(self.render(), encoding="utf-8")


def page_of(*, title: str, about: str, data: Markup) -> str:
    """The page around its data, JSON with `requests` as `drawn` gives them and `tokenBytes`."""
    return render_page(
        "view.html",
        title=title,
        about=about,
        style=verbatim("view.css"),
        chart=verbatim("view_chart.js"),
        request=verbatim("view_request.js"),
        search=verbatim("view_search.js"),
        script=verbatim("view.js"),
        data=data,
    )


def drawn(trace: Trace, replayer: Replayer, keep_last: int | None = None) -> dict[str, Any]:
    """What the page needs of a trace; JSON values only.

    Evictions are those of the file, or, where it has none, those of the rule.

    Raises:
        DataError: the trace has no tokens, or some that are not in the tokenizer.
    """
    tokens = replayer.tokens(trace, pieces=True)
    machine = replayer.machine(tokens, keep_last)
    if trace.evictions is not None:
        machine.evictions = list(trace.evictions)
    length = len(tokens.ids)
    seen = [eviction for eviction in machine.evictions if eviction.point < length - 1]
    lines = block_lines(machine, length)
    record = trace.accounting or account(machine, tokens.prompt_len, length).as_dict()
    return {
        "name": trace.name,
        "prompt": tokens.prompt_len,
        "length": length,
        "steps": max(length - max(tokens.prompt_len, 1), 0),
        "text": "".join(tokens.pieces),
        "sizes": [_utf16(piece) for piece in tokens.pieces],
        "parts": list(parts(machine.blocks, seen, tokens.prompt_len, length)),
        "blocks": [
            {
                "tokens": line.block.block_tokens,
                "memento": line.block.summary_tokens,
                "eviction": seen.index(line.eviction) if line.eviction else None,
                "before": line.kv_before,
                "after": line.kv_after,
            }
            for line in lines
        ],
        "evictions": [[eviction.point, eviction.start, eviction.end] for eviction in seen],
        "curve": curve(seen, max(length - 1, 1)),
        "record": {name: record[name] for name in _SHOWN},
        "notes": _notes(trace, length),
    }


_SHOWN = [
    f"{name}{kind}"
    for name in ("peak_kv_tokens", "final_kv_tokens", "kv_auc")
    for kind in ("", "_without")
]


def curve(evictions: Sequence[Eviction], queries: int) -> list[tuple[int, int]]:
    """Corners `(query, KV tokens)` of the curve; between two of them it is a straight line."""
    held = kv_curve(evictions, queries)
    corners = {0, queries - 1}
    for eviction in evictions:
        corners |= {eviction.point - 1, eviction.point}
    return [(query, held[query]) for query in sorted(corners)]


def parts(
    blocks: Sequence[Block], evictions: Sequence[Eviction], prompt_len: int, length: int
) -> Iterator[Part]:
    """The whole sequence cut wherever the kind of token, the block or the eviction changes."""
    markers = {marker: number for number, block in enumerate(blocks) for marker in block}
    cuts = {0, prompt_len, length} | {index + d for index in markers for d in (0, 1)}
    cuts |= {edge for eviction in evictions for edge in (eviction.start, eviction.end)}
    edges = sorted(cut for cut in cuts if cut <= length)
    number = gone = 0
    for start, end in pairwise(edges):
        while number < len(blocks) and blocks[number].summary_end < start:
            number += 1
        inside = number < len(blocks) and blocks[number].start <= start
        while gone < len(evictions) and evictions[gone].end <= start:
            gone += 1
        evicted = gone < len(evictions) and evictions[gone].start <= start
        if start in markers:
            kind = "marker"
        elif inside:
            kind = _inside(blocks[number], start)
        else:
            kind = "prompt" if end <= prompt_len else "text"
        yield Part(kind, start, end, number if inside else None, gone if evicted else None)


def _inside(block: Block, index: int) -> str:
    if index < block.end:
        return "block"
    return "memento" if index > block.summary_start else "text"


def _utf16(text: str) -> int:
    """Length as JavaScript counts it."""
    return len(text) + sum(ord(character) > 0xFFFF for character in text)


def _notes(trace: Trace, length: int) -> list[str]:
    notes = []
    if isinstance(trace.output, int):
        notes.append("The file holds no text.")
    elif isinstance(trace.prompt, int) and trace.prompt:
        notes.append(f"The file does not hold the prompt of {trace.prompt:,} tokens.")
    # A server does not give the text of the token that ended the turn.
    if trace.length is not None and trace.length not in (length, length + 1):
        notes.append(
            f"Positions are approximate: the server counted {trace.length:,} tokens, this "
            f"tokenizer {length:,}. Saved token ids (/generate, rollout records) are exact."
        )
    return notes
