"""What one response says: its thought and its answer, however the two are marked.

Tags of several model families, harmony channels and OpenMementos blocks are understood. Marks that
cannot be taken apart without guessing make the row an error, so that no tag and no second thought
ever ends up in what a model is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memento_pipeline.records import Span
from memento_pipeline.text.escape import unescape
from memento_pipeline.text.pairs import outside, pairs
from memento_pipeline.text.split import is_boundary

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Marks around a thought. The first counts wherever it stands in a text, the others only where the
text begins with them or holds their end."""

_AGAIN = {tag: re.compile(rf"(?:\s*{re.escape(tag)})+") for pair in TAGS for tag in pair}
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
_HARMONY = re.compile(
    r"(?:<\|start\|>(?P<role>[^<]*+))?(?:<\|channel\|>(?P<channel>[^<]*+))?"
    r"(?:<\|constrain\|>[^<]*+)?<\|message\|>(?P<text>.*?)"
    r"(?P<end><\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>)|\Z)",
    re.DOTALL,
)
_SPECIAL = re.compile(r"<\|(?:block_start\||channel\|>analysis)")  # one scan for both
_THINK = re.compile(r"</?think>")
_MARK = re.compile(rf"{_THINK.pattern}|{_SPECIAL.pattern}")  # what counts wherever it stands
_ANALYSIS = "<|channel|>analysis"
_HEAD = 400  # characters in which a text begins with a tag
_FIRSTS = ("<", "[", "◁")  # of all tags; one character is found twenty times as fast as two


class RowError(Exception):
    """A row that is no trace; the message is its reason."""

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


class Said(NamedTuple):
    """A response taken apart. `marked`: it had marks of a thought. `blocks` cover the thought."""

    thought: str
    answer: str
    closed: bool
    marked: bool
    blocks: tuple[Span, ...] = ()
    mementos: tuple[str, ...] = ()
    notes: Mapping[str, Any] = {}


def take_apart(text: str, *, bare: bool = False) -> Said:
    """Thought and answer of a text.

    Args:
        bare: without marks the whole text is a thought, not an answer.

    Raises:
        RowError: several thoughts, or marks inside one.
    """
    first = _MARK.search(text) if "<" in text else None
    if first is not None and _SPECIAL.search(text, first.start()):
        if any(pairs(text)):
            return _from_blocks(text)
        if _ANALYSIS in text:
            return _from_harmony(text)
        first = _THINK.search(text)
    tags = _other_tags(text, bare) if first is None else TAGS[0]
    if tags is None:
        return Said(*((text, "") if bare else ("", text)), closed=bare, marked=False)
    return _from_tags(text, *tags)


def join(given: Sequence[str], text: str | None) -> Said:
    """A response whose thought is (also) given apart from its text.

    Args:
        given: the thought; the same one may be given several times.
        text: the answer, which may repeat the thought; None: there is none.

    Raises:
        RowError: the thoughts differ.
    """
    said = take_apart(text) if text is not None else Said("", "", closed=True, marked=False)
    if not given:
        return said
    thoughts = [_alone(thought, said.answer) for thought in given]
    if said.marked and said.thought.strip():
        thoughts.append(said.thought)
    if len(thoughts) > 1 and len({thought.strip() for thought in thoughts}) > 1:
        raise RowError("two different thoughts for one answer")
    if said.blocks:
        return said
    return Said(thoughts[0], said.answer, closed=True, marked=True, notes=said.notes)


def _alone(thought: str, answer: str) -> str:
    """A thought given apart, without tags around it."""
    said = take_apart(thought, bare=True)
    if not said.marked:
        return thought
    if said.answer.strip() and said.answer.strip() != answer.strip():
        raise RowError("the thought given apart holds a thought and an answer of its own")
    if said.notes.get("before_think"):
        raise RowError("a tag inside the thought")
    return said.thought


def _other_tags(text: str, bare: bool) -> tuple[str, str] | None:
    """The tags of a text that holds none of the first kind, None where it has no others either."""
    begin = text[:_HEAD].lstrip()
    if begin[:1] in _FIRSTS:
        for pair in TAGS[1:]:
            if begin.startswith(pair[0]):
                return pair
    if not bare:
        for character in _FIRSTS:
            if character in text:
                return next((pair for pair in TAGS[1:] if text.count(pair[1]) == 1), None)
    return None


def _from_tags(text: str, opening: str, closing: str) -> Said:
    """Split at the closing tag. One of the two is there: the opening one is often in the prompt,
    and a text may be cut off."""
    notes: dict[str, Any] = {}
    before, opened, rest = _partition(text, opening)
    if not opened or closing in before:
        before, opened, rest = "", "", text
    if before.strip():
        notes["before_think"] = before
    rest = _without_doubles(rest, opening) if opened else rest
    thought, closed, answer = _partition(rest, closing)
    answer = _solution(_without_doubles(answer, closing))
    if opening[0] in thought and opening in thought:
        raise RowError(f"{opening} inside the thought")
    if _has_thought(answer, opening, closing):
        raise RowError(f"several thoughts in one response: {opening} or {closing} in the answer")
    return Said(thought, answer, closed=bool(closed), marked=True, notes=notes)


def _partition(text: str, tag: str) -> tuple[str, str, str]:
    """`text.partition(tag)`, much faster where no other tag or comparison comes first."""
    place = text.find(tag[0])
    if text.startswith(tag, place):
        return text[:place], tag, text[place + len(tag) :]
    return text.partition(tag)


def _has_thought(answer: str, opening: str, closing: str) -> bool:
    """Whether an answer holds a thought: both tags, or one that begins a line. A tag amid words is
    a word, and will be escaped."""
    if opening not in answer and closing not in answer:
        return False
    if closing in answer.partition(opening)[2]:
        return True
    begins = (line.lstrip() for line in answer.splitlines())
    return any(line.startswith((opening, closing)) for line in begins)


def _without_doubles(text: str, tag: str) -> str:
    """`text`, which follows `tag`, without the same tag again where only space is between."""
    doubled = _AGAIN[tag].match(text)
    return text[doubled.end() :] if doubled else text


def _solution(answer: str) -> str:
    """What stands between the marks of a solution, where there are some."""
    if _SOLUTION[0] not in answer:
        return answer
    before, _, rest = answer.partition(_SOLUTION[0])
    solution, _, after = rest.partition(_SOLUTION[1])
    if before.strip() or after.strip():
        raise RowError("text around the marks of the solution")
    return solution


def _from_harmony(text: str) -> Said:
    """Messages of harmony: one of the channel analysis and one of the channel final."""
    said: dict[str, list[re.Match[str]]] = {"analysis": [], "final": []}
    end = 0
    for found in _HARMONY.finditer(text):
        role, channel = (found["role"] or "assistant").strip(), (found["channel"] or "").strip()
        if text[end : found.start()].strip():
            raise RowError("text outside the messages of harmony")
        if role != "assistant" or channel not in said or found["end"] == "<|call|>":
            raise RowError(f"a harmony message of {role!r} in channel {channel!r}")
        said[channel].append(found)
        end = found.end()
    if text[end:].strip():
        raise RowError("text outside the messages of harmony")
    if len(said["analysis"]) != 1 or len(said["final"]) > 1:
        counts = {channel: len(found) for channel, found in said.items()}
        raise RowError(f"harmony messages {counts}: one of each is expected")
    thought = said["analysis"][0]
    answer = said["final"][0]["text"] if said["final"] else ""
    return Said(thought["text"], answer, closed=bool(thought["end"] or answer), marked=True)


def _from_blocks(text: str) -> Said:
    """An OpenMementos response: the blocks joined are the thought. Text with markers but without
    a single complete pair is no such row: there the markers are words, and are escaped.

    Rows of other writers have lost the white space between blocks; where two sentences would be
    glued together, a newline stands in and is counted in the notes.
    """
    _, opened, rest = text.partition("<think>")
    body, closing, answer = (rest if opened else text).partition("</think>")
    thought = ""
    spans: list[Span] = []
    mementos: list[str] = []
    lost = 0
    for pair in pairs(body):
        block = unescape(pair.block)
        if not is_boundary(thought, block) and not block[:1].isspace():
            thought, lost = thought + "\n", lost + 1
            spans[-1] = Span(spans[-1].start, len(thought))
        spans.append(Span(len(thought), len(thought) + len(block)))
        thought += block
        mementos.append(unescape(pair.memento).strip("\n"))
    if outside(body).strip():
        raise RowError("an OpenMementos row with text outside its blocks and mementos")
    return Said(
        thought,
        unescape(answer),
        closed=bool(closing),
        marked=True,
        blocks=tuple(spans),
        mementos=tuple(mementos),
        notes={"separators_lost": lost} if lost else {},
    )
