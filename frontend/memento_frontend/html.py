"""A thought and its answer as HTML, for notebooks: blocks folded, evicted text grey."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memento_frontend.results import Reasoning

STYLE = (
    "border-left:3px solid #8886;padding:.1em .8em;margin:.3em 0;white-space:pre-wrap;"
    "font-family:ui-monospace,monospace;font-size:.9em"
)


def reasoning_html(found: Reasoning) -> str:
    """The blocks as they fold into their mementos, the answer, and what was held in KV."""
    record = found.accounting or {}
    gone = len(record.get("evicted_spans", ()))
    parts = []
    for number, block in enumerate(found.blocks, start=1):
        size = "" if block.tokens is None else f", {block.tokens} tokens"
        fate = "evicted" if number <= gone else "kept"
        shade = "color:#767676" if number <= gone else ""
        parts.append(
            f'<details style="{STYLE}"><summary><b>memento {number}</b> {_text(block.memento)} '
            f"<small>(block{size}, {fate})</small></summary>"
            f'<div style="{shade}">{_text(block.text)}</div></details>'
        )
    if found.unfinished:
        parts.append(f'<div style="{STYLE};opacity:.7">{_text(found.unfinished)}</div>')
    ending = "" if found.finish_reason == "stop" else f" <small>({_ending(found)})</small>"
    parts.append(f'<div style="{STYLE}"><b>{_text(found.answer)}</b>{ending}</div>')
    if record:
        parts.append(
            f"<small>KV tokens: peak {record['peak_kv_tokens']:,} instead of "
            f"{record['peak_kv_tokens_without']:,}, {record['evicted_tokens']:,} evicted in {gone} "
            "blocks</small>"
        )
    return f"<div>{''.join(parts)}</div>"


def _ending(found: Reasoning) -> str:
    return escape(found.finish_reason or "broken off")


def _text(text: str) -> str:
    return escape(text.strip())
