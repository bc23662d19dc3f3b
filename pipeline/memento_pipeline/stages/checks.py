"""What a program can see of a memento's faithfulness: its numbers and formulas are the block's.

Not a judge of quality. A problem is a fact about the two texts, worded for whoever corrects it.
"""

from __future__ import annotations

import re

from memento_pipeline.text.escape import special_count

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LIST_NUMBER = re.compile(r"^\s*(?:[-*]\s*)?\(?\d{1,2}[.)](?=\s)", re.MULTILINE)
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$])\$(?![\s$])([^$\n]+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_SPACING = re.compile(
    r"\s+|\\(?:left|right|,|;|!|:|quad|displaystyle)(?![A-Za-z])|[${}]|\\[()\[\]]"
)
_RELATION = re.compile(r"<=|>=|=|<|>|≈|≤|≥|≠|→|\\(?:approx|leq?|geq?|neq|to|implies|equiv)\b|,")
_SAME = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times)(?![A-Za-z])|[×·∙]"), "*"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\sqrt|sqrt"), "√"),
)
_SHOWN = 5  # problems of one kind that are named


def check_memento(block_text: str, memento: str) -> tuple[str, ...]:
    """Problems of `memento` as a compression of `block_text`, empty if none are seen."""
    text = memento.strip()
    if not text:
        return ("the memento is empty",)
    problems = []
    if special_count(text):
        problems.append("the memento contains special tokens")
    if len(text) >= len(block_text.strip()):
        problems.append("the memento is not shorter than its block")
    problems += _named("number", missing_numbers(block_text, text))
    problems += _named("formula", missing_formulas(block_text, text))
    return tuple(problems)


def missing_numbers(block_text: str, memento: str) -> list[str]:
    """Numbers of the memento that the block does not contain; list numbering does not count."""
    known = {_value(number) for number in _NUMBER.findall(block_text)}
    lower = block_text.lower()
    known |= {str(n) for n, word in enumerate(_WORDS) if re.search(rf"\b{word}\b", lower)}
    numbers = _NUMBER.findall(_LIST_NUMBER.sub(" ", memento))
    return [number for number in dict.fromkeys(numbers) if not _contained(number, known)]


def missing_formulas(block_text: str, memento: str) -> list[str]:
    """Delimited formulas of the memento that the block does not contain.

    Spacing, delimiters and the usual spellings of the same operator do not matter. A chain of
    equations may be put together from sides that the block has.
    """
    block = _plain(block_text)
    missing = []
    for match in _FORMULA.finditer(memento):
        formula = next(group for group in match.groups() if group is not None)
        plain = _plain(formula)
        sides = [side for side in _RELATION.split(plain) if side]
        if plain not in block and not (len(sides) > 1 and all(side in block for side in sides)):
            missing.append(formula.strip())
    return list(dict.fromkeys(missing))


def _contained(number: str, known: set[str]) -> bool:
    parts = re.split(r"[.,]", number)
    return (
        _value(number) in known
        or ("," in number and all(_value(part) in known for part in number.split(",")))
        or (len(parts) > 2 and all(part in known for part in parts))
    )


def _value(number: str) -> str:
    """One spelling per number: `1,000` is `1000` and `2.50` is `2.5`."""
    plain = re.sub(r",(?=\d{3}(?:\D|$))", "", number)
    if re.fullmatch(r"\d+\.\d+", plain):
        plain = plain.rstrip("0").rstrip(".")
    return plain.lstrip("0") or "0"


def _plain(text: str) -> str:
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return _SPACING.sub("", text)


def _named(kind: str, values: list[str]) -> list[str]:
    named = [f"{kind} not in the block: {value}" for value in values[:_SHOWN]]
    if len(values) > _SHOWN:
        named.append(f"{len(values) - _SHOWN} more {kind}s not in the block")
    return named
