"""Complete blocks with their mementos in a text, found in one pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

BLOCK_START, BLOCK_END = "<|block_start|>", "<|block_end|>"
SUMMARY_START, SUMMARY_END = "<|summary_start|>", "<|summary_end|>"
MARKERS = (BLOCK_START, BLOCK_END, SUMMARY_START, SUMMARY_END)

_MARKER = re.compile("|".join(map(re.escape, MARKERS)))


class Pair(NamedTuple):
    """A block and its memento; `[start, end)` covers their markers too."""

    start: int
    end: int
    block: str
    memento: str


def pairs(text: str) -> Iterator[Pair]:
    """Every place where the four markers follow each other with only white space between block
    and memento. Linear in the text, however many markers stand alone."""
    window: list[re.Match[str]] = []
    for found in _MARKER.finditer(text):
        window.append(found)
        place = MARKERS.index(found[0])
        if place != len(window) - 1 or (place == 2 and _between(text, window)):
            window = [found] if place == 0 else []
        elif place == 3:
            first, closed, opened, last = window
            block = text[first.end() : closed.start()]
            yield Pair(first.start(), last.end(), block, text[opened.end() : last.start()])
            window = []


def outside(text: str) -> str:
    """What is left of a text without its pairs."""
    kept, end = [], 0
    for pair in pairs(text):
        kept.append(text[end : pair.start])
        end = pair.end
    return "".join([*kept, text[end:]])


def _between(text: str, window: list[re.Match[str]]) -> bool:
    """Whether words stand between a block and what should be its memento."""
    gap = text[window[1].end() : window[2].start()]
    return bool(gap) and not gap.isspace()
