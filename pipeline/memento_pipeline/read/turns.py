"""Chat turns as problem and response: one of the user, then one of the assistant.

Whatever the pipeline cannot carry (tool calls, images, further turns) makes the row an error;
system and developer messages are noted. Nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memento_pipeline.read.said import RowError, Said, join

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot"),
    "system": ("system", "developer"),
}
"""Who speaks, and the names that data sets have for it."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "reasoning_details")
"""Where a turn or a row gives a thought apart from its text."""

_CALLS = frozenset(("tool_calls", "function_call"))
_MEDIA = frozenset(("image", "images", "audio", "audios", "video", "videos"))
_TEXT_PARTS = ("text", "output_text", "input_text", "reasoning_text", "reasoning.text")
_THOUGHT_PARTS = ("thinking", "reasoning", "thought")
_ORDER = ["user", "assistant"]
_SWITCH = 16  # characters: a thought is not copied only to be compared with "on"
_THOUGHT_KEYS = frozenset(THOUGHT_KEYS)
_BY_NAME = {name: role for role, names in ROLES.items() for name in names}


class Chat(NamedTuple):
    """`system`: all system and developer messages."""

    problem: str
    said: Said | None  # None: no assistant turn
    system: tuple[str, ...]


def read_chat(turns: Any, *, answered: bool = True, given: Sequence[str] = ()) -> Chat:
    """A conversation of one question.

    Args:
        answered: the assistant's turn is part of it.
        given: the thought, where it is known from elsewhere and the turn has none.

    Raises:
        RowError: anything but one user turn, followed by one of the assistant if `answered`.
    """
    roles = _roles(turns)
    order = [role for role, _ in roles if role != "system"]
    if order != _ORDER[: 1 + answered]:
        for role, wanted in (("user", 1), ("assistant", int(answered))):
            if order.count(role) != wanted:
                how = "exactly one is" if wanted else "none is"
                raise RowError(f"{order.count(role)} {role} turns: {how} expected")
        raise RowError("the assistant speaks first")
    problem, said, system = "", None, []
    for role, turn in roles:
        if role == "assistant":
            said = read_turn(turn, given)
            continue
        text, thoughts = _content(turn)
        if thoughts or text is None:
            raise RowError(f"the {role} turn has no text")
        if role == "user":
            problem = text
        elif text.strip():
            system.append(text)
    return Chat(problem, said, tuple(system))


def read_answer(turns: Any, given: Sequence[str] = ()) -> Said:
    """What an answer says that is given as a turn, or as a list with one.

    Raises:
        RowError: it is no single turn of the assistant, or one that `read_turn` refuses.
    """
    roles = _roles([turns] if isinstance(turns, dict) else turns)
    if [role for role, _ in roles] != ["assistant"]:
        raise RowError(
            f"{len(roles)} turns in the answer: exactly one of the assistant is expected"
        )
    return read_turn(roles[0][1], given)


def read_turn(turn: Mapping[str, Any], given: Sequence[str] = ()) -> Said:
    """What an assistant turn says.

    Raises:
        RowError: it calls tools, holds images, refuses, or its thoughts differ.
    """
    for key in () if _CALLS.isdisjoint(turn) else sorted(_CALLS & turn.keys()):
        if turn[key]:
            raise RowError(f"the answer has {key}: only text can be trained on")
    if isinstance(turn.get("refusal"), str) and turn["refusal"].strip():
        raise RowError("the answer is a refusal")
    text, thoughts = _content(turn)
    thoughts += given_thoughts(turn)
    if text is None and not thoughts:
        raise RowError("a turn has no text")
    said = join(thoughts, text)
    return said if said.marked else join(given, text)


def given_thoughts(row: Mapping[str, Any]) -> list[str]:
    """The thoughts that a turn or row gives apart, in one or several keys."""
    if _THOUGHT_KEYS.isdisjoint(row):
        return []
    texts = [thought_text(key, row[key]) for key in THOUGHT_KEYS if row.get(key) is not None]
    return [text for text in texts if text and not text.isspace()]


def thought_text(key: str, value: Any) -> str | None:
    """The thought in a key; None where the key holds none (`reasoning: "on"` is a switch).

    Raises:
        RowError: parts that hold no readable thought.
    """
    if isinstance(value, str):
        switch = len(value) < _SWITCH and value.strip().lower() in ("on", "off")
        return None if switch else value
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return "".join(_thought(part, key) for part in value) if value else None
    return None  # numbers and flags


def _thought(part: Any, kind: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"{kind}: a part that is no text")
    if "encrypted" in str(part.get("type")) or "redacted" in str(part.get("type")):
        raise RowError("the thought is encrypted")
    for key in ("thinking", "reasoning", "thought", "text", "content", "reasoning_content"):
        value = part.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            return "".join(_thought(inner, kind) for inner in value)
    if part.get("summary"):
        raise RowError("only a summary of the thought is there")
    raise RowError(f"a part of type {part.get('type') or kind!r} without text")


def _content(turn: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Text of a turn (None: it has none) and the thoughts among its parts."""
    for key in () if _MEDIA.isdisjoint(turn) else sorted(_MEDIA & turn.keys()):
        if turn[key]:
            raise RowError(f"a turn with {key}: only text can be trained on")
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, dict):
        content = [content]
    if content is None or isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RowError(f"the content of a turn must be text, not {type(content).__name__}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = _kind(part)
        if kind in _THOUGHT_PARTS or "redacted" in kind:
            if "".join(texts).strip() or thoughts:
                raise RowError("a thought after text, or several thoughts, in one turn")
            thoughts.append(_thought(part, kind))
        elif kind not in _TEXT_PARTS:
            raise RowError(f"a part of type {kind!r}: only text can be trained on")
        elif isinstance(text := part if isinstance(part, str) else part.get("text"), str):
            texts.append(text)
        else:
            raise RowError("a text part without text")
    return ("".join(texts) if texts else None), thoughts


def _kind(part: Any) -> str:
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        return type(part).__name__
    if part.get("type") is not None:
        return str(part["type"])
    return next((key for key in ("text", *_THOUGHT_PARTS) if part.get(key) is not None), "unknown")


def _roles(turns: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(turns, list):
        raise RowError("turns must be a list of objects")
    found: list[tuple[str, Mapping[str, Any]]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError("turns must be a list of objects")
        name = str(turn.get("role") or turn.get("from") or "").lower()
        if name not in _BY_NAME:
            raise RowError(f"a turn of {name!r}: only user, assistant and system are read")
        found.append((_BY_NAME[name], turn))
    return found
