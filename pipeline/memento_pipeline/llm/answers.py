"""Reading what LLMs answer: strictly, by item number, never filling a gap.

A parser returns the items that can be trusted and says in words what was wrong with the rest; the
caller asks again for what is missing. Nothing is guessed: no default score, no shifting of items
into gaps, no number taken out of prose.

Scores and judgements are JSON. Mementos are tagged plain text: a model that writes `\\frac` in JSON
with one backslash has said form feed and `rac`, and the formula is silently gone.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from memento_pipeline.llm.wire import Schema

T = TypeVar("T")

RUBRIC = {
    "formulas": 3,
    "numbers": 2,
    "methods": 2,
    "validation": 1,
    "correctness": 1,
    "result_first": 1,
}
"""Parts of a memento's grade and the most points of each; ten together (paper, section 2)."""

LONGEST_FEEDBACK = 2000  # characters


class Parsed(NamedTuple, Generic[T]):
    """Trusted items by number, and what was wrong (our words only, never the LLM's)."""

    items: dict[int, T]
    problems: tuple[str, ...]


class Judgement(NamedTuple):
    score: float  # 0-10
    feedback: str


class Review(NamedTuple):
    judgement: Judgement
    improved: str | None  # a better memento, where the answer holds a usable one


class _UnusableError(Exception):
    """The whole answer cannot be used."""


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _integer(most: int) -> dict[str, Any]:
    return {"type": "integer", "enum": list(range(most + 1))}


_GRADE = _integer(3)
_JUDGEMENT = _object(
    {part: _integer(most) for part, most in RUBRIC.items()}
    | {"deductions": _integer(10), "feedback": {"type": "string"}}
)


def scores_schema(numbers: Sequence[int]) -> Schema:
    """One required key per boundary: nothing can be left out, repeated or added."""
    return _by_number("scores", numbers, _GRADE)


def judgements_schema(numbers: Sequence[int]) -> Schema:
    """The same for grades of mementos."""
    return _by_number("judgements", numbers, _JUDGEMENT)


def _by_number(name: str, numbers: Sequence[int], item: dict[str, Any]) -> Schema:
    listed = _object({str(number): {"$ref": "#/$defs/item"} for number in numbers})
    return Schema(name, _object({name: listed}) | {"$defs": {"item": item}})


def parse_scores(text: str, wanted: Sequence[int]) -> Parsed[int]:
    """`{"scores": {"12": 2, ...}}`: integers 0-3 by boundary number."""
    return _parse_numbered(text, wanted, "scores", lambda item: _whole(item, "s", 3))


def parse_judgements(text: str, wanted: Sequence[int]) -> Parsed[Judgement]:
    """`{"judgements": {"1": {<points of each part>, "deductions": 0, "feedback": "..."}}}`.

    The grade is added up here, so it cannot contradict its parts.
    """
    return _parse_numbered(text, wanted, "judgements", _judgement)


def _judgement(item: dict[str, Any]) -> Judgement:
    points = sum(_whole(item, part, most) for part, most in RUBRIC.items())
    score = max(0, points - _whole(item, "deductions", 10))
    feedback = item.get("feedback")
    if not isinstance(feedback, str):
        raise ValueError("feedback is not text")
    return Judgement(float(score), " ".join(feedback.split())[:LONGEST_FEEDBACK])


def _whole(item: dict[str, Any], name: str, most: int) -> int:
    value = item.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is not a whole number")
    if not 0 <= value <= most:
        raise ValueError(f"{name} is not within 0-{most}")
    return value


def parse_mementos(text: str, wanted: Sequence[int], nonce: str) -> Parsed[str]:
    """`<memento-3-NONCE> ... </memento-3-NONCE>` for each number.

    Text outside the tags is ignored; an unclosed, empty or doubled memento is not used.
    """
    try:
        body = strip_reasoning(text)
    except _UnusableError as error:
        return Parsed({}, (str(error),))
    items: dict[int, str] = {}
    problems: list[str] = []
    doubled: set[int] = set()
    for number, _, memento, _ in _tagged(body, nonce):
        if number not in wanted:
            return Parsed({}, (f"number {number} was not asked for",))
        if problem := _memento_problem(memento, nonce):
            problems.append(f"number {number}: {problem}")
        elif items.setdefault(number, memento) != memento:
            doubled.add(number)
            problems.append(f"number {number} occurs twice")
    kept = {number: memento for number, memento in items.items() if number not in doubled}
    return Parsed(kept, _with_missing(problems, wanted, kept))


def parse_reviews(text: str, wanted: Sequence[int], nonce: str) -> Parsed[Review]:
    """Judgements as `parse_judgements` reads them, and the tagged mementos that stand beside them.

    A judgement counts without a memento: that can be asked for by itself.
    """
    try:
        body = strip_reasoning(text)
    except _UnusableError as error:
        return Parsed({}, (str(error),))
    mementos = parse_mementos(body, wanted, nonce).items
    judgements = parse_judgements(_without_tagged(body, nonce) or "-", wanted)
    items = {
        number: Review(judgement, mementos.get(number))
        for number, judgement in judgements.items.items()
    }
    return Parsed(items, judgements.problems)


def _without_tagged(text: str, nonce: str) -> str:
    """A memento may quote JSON; what is left is ours to read."""
    kept, end = [], 0
    for tag in _tagged(text, nonce):
        kept.append(text[end : tag.opens])
        end = tag.closed
    return "".join([*kept, text[end:]])


class _Tag(NamedTuple):
    """A closed tag: where it opens, its text, and where it has closed."""

    number: int
    opens: int
    text: str
    closed: int


def _tagged(text: str, nonce: str) -> Iterator[_Tag]:
    """Closed tags. A search by `find`, because a pattern with a gap in it takes quadratic time on
    an answer full of openings."""
    end = 0
    for match in re.finditer(rf"<memento-(\d{{1,9}})-{nonce}>", text):
        if match.start() < end:
            continue
        close = f"</memento-{match[1]}-{nonce}>"
        stop = text.find(close, match.end())
        if stop < 0:
            return
        end = stop + len(close)
        inner = _MARK.sub("", text[match.end() : stop]).strip()
        yield _Tag(int(match[1]), match.start(), inner, end)


_MARK = re.compile(r" ?⟦\d+⟧")
"""A numbered cut of a prompt: no trace shows these brackets, see `neutralise`."""


def _memento_problem(memento: str, nonce: str) -> str | None:
    if not memento:
        return "it is empty"
    if nonce in memento:
        return "it contains one of the prompt's tags"
    if special_tokens(memento):
        return "it contains a special token"
    return None


def _parse_numbered(
    text: str, wanted: Sequence[int], name: str, read: Callable[[dict[str, Any]], T]
) -> Parsed[T]:
    try:
        listed = _entries(_only_object(strip_reasoning(text), name), name)
    except _UnusableError as error:
        return Parsed({}, (str(error),))
    items: dict[int, T] = {}
    problems: list[str] = []
    doubled: set[int] = set()
    for number, entry in listed:
        if number not in wanted:
            # The numbering is off, so none of the numbers can be trusted.
            return Parsed({}, (f"number {number} was not asked for",))
        try:
            value = read(entry)
        except ValueError as error:
            problems.append(f"number {number}: {error}")
            doubled.add(number)
            continue
        if items.setdefault(number, value) != value:
            problems.append(f"number {number} occurs twice")
            doubled.add(number)
    kept = {number: value for number, value in items.items() if number not in doubled}
    return Parsed(kept, _with_missing(problems, wanted, kept))


def _entries(listed: Any, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Numbers and what was said of them: by key, as asked for, or in a list with `n`, which models
    write where no schema holds them."""
    entries: list[tuple[int, dict[str, Any]]] = []
    if isinstance(listed, dict):
        for key, value in listed.items():
            if not re.fullmatch(r"\d{1,9}", key):
                raise _UnusableError("an entry has no number n")
            entries.append((int(key), value if isinstance(value, dict) else {"s": value}))
        return entries
    if not isinstance(listed, list):
        raise _UnusableError(f"{name} is not a list")
    for entry in listed:
        number = entry.get("n") if isinstance(entry, dict) else None
        if isinstance(number, bool) or not isinstance(number, int):
            raise _UnusableError("an entry has no number n")
        entries.append((number, entry))
    return entries


def _with_missing(
    problems: list[str], wanted: Sequence[int], kept: dict[int, Any]
) -> tuple[str, ...]:
    missing = [number for number in wanted if number not in kept]
    if missing and not problems:
        problems = [f"missing: {', '.join(map(str, missing))}"]
    return tuple(problems)


def _only_object(text: str, name: str) -> Any:
    """What the one JSON object in `text` that has `name` holds there; all else is ignored: prose,
    sketches that are no JSON, other objects, and other members of the same one."""
    found: list[Any] = []
    work, opening = 0, _OPENING.search(text)
    while opening is not None and work <= MOST_WORK * len(text):
        place = opening.start()
        value, end = _decode(text, place)
        work += end - place + MOST_WORK * len(text) // MOST_OPENINGS
        whole = isinstance(value, dict) and name in value
        if whole:
            found.append(value[name])
        # What was no JSON, or not the object, may have the right one inside it.
        opening = _OPENING.search(text, end if whole else place + 1)
    if not found:
        raise _UnusableError("it is not the JSON object that was asked for")
    if any(other != found[0] for other in found):
        raise _UnusableError("it holds more than one answer")
    return found[0]


MOST_WORK, MOST_OPENINGS = 20, 5000
"""Characters decoded per character of an answer, and objects tried: linear time for any answer."""

_OPENING = re.compile(r'\{\s*"')

_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)


def _decode(text: str, place: int) -> tuple[Any, int]:
    """The value at `place` and where it ends; None, and how far it was read, when it is not JSON.

    Tried once more with stray backslashes doubled: feedback often quotes LaTeX as it is. Only text
    can change by this, no number.
    """
    try:
        return _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Invalid \\"):
            return None, error.pos + 1
    except (ValueError, RecursionError):
        return None, len(text)
    added: list[int] = []  # where a backslash was, in the text with them doubled

    def double(match: re.Match[str]) -> str:
        if match[1] in '"\\/':
            return match[0]
        added.append(match.start() + len(added))
        return rf"\\{match[1]}"

    rest = _BACKSLASH.sub(double, text[place:])
    try:
        value, end = _DECODER.raw_decode(rest)
    except (ValueError, RecursionError):
        return None, len(text)
    return value, place + end - bisect(added, end)


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return value


# NaN and Infinity become text, which no number field takes: one bad entry, not a bad answer.
_DECODER = json.JSONDecoder(parse_constant=str, object_pairs_hook=_refuse_doubles)

_REASONING_OPENS = re.compile(r"\s*<(think|thinking|reasoning)>", re.IGNORECASE)
_REASONING_ENDS = re.compile(
    r"</(?:think|thinking|reasoning)>|<\|channel\|>final<\|message\|>", re.IGNORECASE
)


def strip_reasoning(text: str) -> str:
    """What comes after the reasoning of a reasoning model."""
    ends = [match.end() for match in _REASONING_ENDS.finditer(text)]
    if not ends and _REASONING_OPENS.match(text):
        raise _UnusableError("it ends inside its reasoning")
    body = text[ends[-1] :] if ends else text
    if not body.strip():
        raise _UnusableError("it is empty")
    return body


_SPECIAL = re.compile(
    r"<(/?(?:think|thinking|s|bos|eos|pad|unk|start_of_turn|end_of_turn)|\|[^|<>\s]{1,64}\|"
    r"|\uff5c[^<>\uff5c\n]{1,64}\uff5c)>|\[(/?INST)\]|<(<(?:/?)SYS>)>",
    re.IGNORECASE,
)


def special_tokens(text: str) -> list[str]:
    """Chat markup and special tokens of common models that occur in `text`."""
    return [match[0] for match in _SPECIAL.finditer(text)]


def neutralise(text: str) -> str:
    """`text` for use inside a prompt: special tokens lose their brackets, and so do the marks that
    number boundaries. For reading only; what is stored and trained on is never changed."""
    text = text.replace("⟦", "[").replace("⟧", "]")
    return _SPECIAL.sub(lambda match: f"‹{match[0][1:-1]}›", text)
