"""A thought cut into sentences, without losing a byte (stage 2).

    text      |First, x = 2.⎵|Then (a. b) holds:⏎|$$ y = 4 $$⏎⏎|So y = 4.|
    edges     0              14                  33           46        55
    no_cut              no            yes (colon)     no... one flag per inner edge

Sentences are offsets into the text. Where blocks must not end is said by flags, never by editing
the text. Every pass is one scan by a compiled expression whose repeats cannot backtrack, so that
the time is linear for any input.

A boundary always lies after white space or directly after a CJK sentence end.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection
from itertools import islice, pairwise

from memento_pipeline.records import Sentences
from memento_pipeline.text.protect import Spans, protected_spans
from memento_pipeline.text.tokens import TokenCounter, count_between

MIN_TOKENS = 5
"""Sentences with fewer tokens join a neighbour."""

_CJK_END = "。！？；｡"
_CLOSERS = "\"'”’)\\]*_»"
_CANDIDATE = re.compile(  # one leading set lets the engine skip quickly
    rf"""[.!?…\n{_CJK_END}](?:
    (?<=[.!?…])(?<![.!?…]{{2}})[.!?…]*+[{_CLOSERS}]*+[^\S\n]++(?=\S)  # sentence end in a line
    |(?<=\n)(?:[^\S\n]*+\n)*+                                         # line end, blank lines
    |(?<=[{_CJK_END}])(?<![{_CJK_END}]{{2}})[{_CJK_END}]*+[”’」』）"]*+\s*+  # needs no space
    )""",
    re.VERBOSE,
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[“\"'])(?:e\.g|i\.e|cf|vs|viz|resp|approx|etc|al|Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|Fig|"
    r"Figs|Eq|Eqs|Eqn|No|Nos|Vol|Sec|Ch|Thm|Lem|Prop|Cor|Def|Ref|pp|p|w\.r\.t|a\.k\.a|[A-Z]\.\s?[A-Z])$"
)
_INITIAL = re.compile(r"(?<!\w)[A-Z]\.\s+[A-Z]\.")
_LIST_NUMBER = re.compile(r"\n[^\S\n]*(?:[-*#>]+[^\S\n]*)?\**(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})$")
_LOOKBACK = 24  # characters that the expressions above may need
_JOINS_BACK = re.compile(
    r"\s*+(?:(?:Therefore|Thus|So|Hence|Consequently|Accordingly|Then|Or|Which|Where|Giving)\b"
    r"|因此|所以|于是|故|[=+×·≤≥≈→<>a-z])"
)
_OPEN_ENDS = frozenset(":：=+-*/×·,，<>≤≥≈→&(\\")
_WORD = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|exp|mod|lim|max|min|frac)\b)[A-Za-z]{3,}"
    r"|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
)
_SYMBOL = re.compile(r"[=+×·√^≈≤≥<>\\|/]")
_CALCULATION_WORDS = 4
_ANNOUNCES = re.compile(
    r"\s*+(?:(?:Wait|Hmm|Okay|OK|Ok|Alternatively|Now|So|Next|First|Actually|But|Maybe)\b"
    r"[, ]+){0,3}"
    r"(?:[Ll]et me|[Ll]et['’]s|[Ll]et us)\b"
)
_ANNOUNCEMENT_TOKENS = 20


def split(thought: str, counter: TokenCounter, ends: Collection[int] = ()) -> Sentences:
    """Cut `thought` into sentences and mark the boundaries at which no block may end.

    Args:
        ends: characters at which a sentence ends and a block may end, whatever the text says.
    """
    given = {end for end in ends if 0 < end < len(thought)}
    inner = sorted(given.union(_boundaries(thought, protected_spans(thought))))
    edges = [0, *inner, len(thought)] if thought else [0]
    tokens = count_between(counter, thought, edges)
    flags = _no_cut(thought, edges, tokens)
    return Sentences(
        edges=tuple(edges),
        no_cut=tuple(flag and edge not in given for edge, flag in zip(inner, flags, strict=True)),
        tokens=tuple(tokens),
        tokenizer=counter.name,
    )


def is_boundary(left: str, right: str) -> bool:
    """Whether a sentence boundary of this module could lie between the two texts."""
    if not left or not right:
        return True
    return left[-1].isspace() or left.rstrip('”’」』）"')[-1:] in set(_CJK_END)


def _boundaries(text: str, protected: Spans) -> list[int]:
    """Inner edges, rising: sentence ends that lie in no protected span."""
    cuts: list[int] = []
    starts, ends = protected
    first = len(text) - len(text.lstrip())  # leading white space belongs to the first sentence,
    last = len(text.rstrip())  # and trailing white space to the last
    for match in _CANDIDATE.finditer(text, first):
        cut = match.end()
        if cut >= last:
            break
        place = bisect.bisect_left(starts, cut) - 1  # the last span that starts before the cut
        if place >= 0 and cut < ends[place]:
            continue
        if text[match.start()] in ".…" and _goes_on(text, match.start(), cut):
            continue
        cuts.append(cut)
    return cuts


def _goes_on(text: str, dot: int, following: int) -> bool:
    """Whether the dot ends an abbreviation, an initial or a list number, not a sentence."""
    if text[following].islower():
        return True
    if text[dot + 1] in ".…":
        return False
    before = text[max(0, dot - _LOOKBACK) : dot]
    if dot <= _LOOKBACK:
        before = "\n" + before
    initials = _INITIAL.match(text, dot - 1) if dot else None
    return bool(initials or _ABBREVIATION.search(before) or _LIST_NUMBER.search(before))


def _no_cut(text: str, edges: list[int], tokens: list[int]) -> list[bool]:
    """One flag per inner boundary: true where the sentences on both sides belong together."""
    count = len(tokens)
    flags = [False] * (count + 1)  # flags[i] is the boundary before sentence i
    after_break = True  # a blank line, or nothing, stands before the sentence
    for index, (start, end) in enumerate(pairwise(edges)):
        piece = text[start:end]
        body = piece.rstrip()
        announces = tokens[index] < _ANNOUNCEMENT_TOKENS and _ANNOUNCES.match(piece)
        if body[-1:] in _OPEN_ENDS or announces:
            flags[index + 1] = True
        if _JOINS_BACK.match(piece) or _is_calculation(piece):
            flags[index] = True
        before_break = piece.count("\n", len(body)) > 1
        if tokens[index] < MIN_TOKENS:
            # A fragment stays in its paragraph; one that stands alone leads to what follows.
            last = index + 1 == count
            flags[index if last or (before_break and not after_break) else index + 1] = True
        after_break = before_break
    return flags[1:count]


def _is_calculation(piece: str) -> bool:
    """A line of symbols with hardly a word of its own continues what stands before it."""
    words = len(list(islice(_WORD.finditer(piece), _CALCULATION_WORDS)))
    return words == 0 or (words < _CALCULATION_WORDS and bool(_SYMBOL.search(piece)))
