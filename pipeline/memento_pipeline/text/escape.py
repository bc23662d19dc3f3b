r"""Marker-like text in raw data, made harmless and back again.

`<|block_end|>` in a trace becomes `<\|block_end|>`, `</think>` becomes `<\/think>`: no tokenizer
takes them for special tokens. A backslash is added to what already has some, so that `unescape` is
exact: `unescape(escape(text)) == text` for every text.
"""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"<(\\*)(?=[|｜][^\s<>|｜]{1,64}[|｜]>|/?think>)")
_ESCAPED = re.compile(r"<\\(\\*)(?=[|｜][^\s<>|｜]{1,64}[|｜]>|/?think>)")


def escape(text: str) -> str:
    """Neutralise `<|name|>` (also with full-width bars), `<think>` and `</think>`."""
    return _SPECIAL.sub(r"<\\\1", text)


def unescape(text: str) -> str:
    """Exact inverse of `escape`."""
    return _ESCAPED.sub(r"<\1", text)


def special_count(text: str) -> int:
    """How many places of `text` the escaping changes."""
    return sum(1 for _ in _SPECIAL.finditer(text))
