r"""Spans of a text in which no sentence may end: code, math, parentheses.

An opening mark without its partner protects nothing: parentheses and inline math must close on
their line, display math before the next opening mark, and every kind has a longest extent. So an
unbalanced bracket cannot switch the splitter off. Repeats are possessive (`*+`): linear time.
"""

from __future__ import annotations

import re

Spans = tuple[list[int], list[int]]
"""Disjoint spans as rising starts and ends."""

MAX_CODE = 32_000
MAX_MATH = 8_000
MAX_INLINE = 1_000
"""Longest protected extents in characters; what is longer may be cut at its lines."""

_INLINE = re.compile(
    r"""`[^`\n]++`
    |\$\$(?:[^$\n]++|\n(?![^\S\n]*+\n)|\$(?!\$))*+\$\$
    |\$(?![\s$])[^$\n]++(?<!\s)\$(?!\d)
    |\\\[(?:[^\\]++|\\[^\[\]])*+\\\]
    |\\\((?:[^\\\n]++|\\[^()\n]|\n(?![^\S\n]*+\n))*+\\\)
    |\\\\                              # an escaped backslash: `\\[2pt]` opens nothing
    |\((?:[^()\n]++|\((?:[^()\n]++|\([^()\n]*+\))*+\))*+\)
    """,
    re.VERBOSE,
)
_DISPLAY = ("$$", "\\[")
_FENCE = re.compile(r"^[^\S\n]{0,12}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{([A-Za-z]{1,32}\*?)\}")
_CODE_LINE = (
    r"(?:(?:[ ]{4}|\t)[^\n]++"
    r"|(?:def|class|import|from|return|if|elif|else|for|while|try|except|with|print|func|fn|let|var|"
    r"const|public|private|static|void|int|double|float|bool|char|long|string|struct|using|include|"
    r"\#include|\#define|@\w+)\b[^\n]*+(?<=[\w)\]>:;{}\"'])"
    r"|[^\n\\$]*+(?<=[;{}]))"
)
_CODE_RUN = re.compile(
    rf"^(?:{_CODE_LINE}(?:\n|\Z))(?:(?:{_CODE_LINE}|[^\S\n]*+)(?:\n|\Z))++", re.M
)
_EVIDENCE = re.compile(
    r"^[^\S\n]*+(?:(?:def|class|fn|func)[ ]\w|import \w|from \w+ import|return\b|\#"
    r"|(?:for|while|if|elif|else|try|with)\b[^\n]*+(?<=[:{])$"
    r"|\w[\w.\[\]]*+[ ]?[-+*/|]?=(?!=)|[^\n]*+(?<=[;{}])$|\w[\w.]*+\([^\n]*+(?<=\))$)",
    re.M,
)


def protected_spans(text: str) -> Spans:
    """All protected spans of `text`, merged where they overlap."""
    spans = [*_fences(text), *_code_runs(text), *_environments(text), *_inline(text)]
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted(spans):
        if ends and start < ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends


def _inline(text: str) -> list[tuple[int, int]]:
    spans = []
    for match in _INLINE.finditer(text):
        start, end = match.span()
        longest = MAX_MATH if text.startswith(_DISPLAY, start) else MAX_INLINE
        if 2 < end - start <= longest:
            spans.append((start, end))
    return spans


def _fences(text: str) -> list[tuple[int, int]]:
    spans = []
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opened is None:
            opened = match
            continue
        mark, info = opened[1], match[2].strip()
        if not info and match[1].startswith(mark):
            if match.end() - opened.start() <= MAX_CODE:
                spans.append((opened.start(), match.end()))
            opened = None
        elif info and match[1][0] == mark[0]:
            opened = match  # the earlier fence was never closed
    return spans


def _code_runs(text: str) -> list[tuple[int, int]]:
    """Two or more lines that look like code, most of them clearly so."""
    spans = []
    for match in _CODE_RUN.finditer(text):
        run = match[0].rstrip()
        lines = sum(1 for line in run.split("\n") if line.strip())
        if lines >= 2 and 2 * len(_EVIDENCE.findall(run)) >= lines and len(run) <= MAX_CODE:
            spans.append((match.start(), match.start() + len(run)))
    return spans


def _environments(text: str) -> list[tuple[int, int]]:
    """Outermost matched `\\begin{x} ... \\end{x}`, amortised linear for any nesting."""
    spans: list[tuple[int, int]] = []
    stack: list[tuple[str, int]] = []
    open_count: dict[str, int] = {}
    for match in _ENVIRONMENT.finditer(text):
        name = match[2]
        if match[1] == "begin":
            stack.append((name, match.start()))
            open_count[name] = open_count.get(name, 0) + 1
        elif open_count.get(name):
            while True:
                opened, start = stack.pop()
                open_count[opened] -= 1
                if opened == name:
                    break
            if match.end() - start <= MAX_MATH:
                spans.append((start, match.end()))
    return spans
