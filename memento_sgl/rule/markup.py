"""The chat markup of a model, learned from its own chat template.

A conversation of known words is rendered; what stands around the assistant's words is the markup:

    ... U2 <|im_end|>\\n<|im_start|>assistant\\n A2 <|im_end|>\\n
           [ user ends ][ header           ]     [ turn ends   ]

What a history and a generation prompt have in common is the header (thinking templates put an
empty thought into the one or the other). It must begin with a token of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from memento_sgl.errors import MarkerError
from memento_sgl.rule.config import MementoConfig, shown
from memento_sgl.rule.markers import MOST_TOKENS, MarkerIds, Tokenizer, resolve_markers

logger = logging.getLogger(__name__)

USER, SAID, ASKED, ANSWER, RESULT = "Uqaz", "Aqbz", "Uqcz", "Aqdz", "Tqez"
"""Words of the conversation that is rendered: in no template, and changed by none."""
OPTIONS = (
    *("im_start_token", "assistant_token", "im_end_token"),
    *("section_start_tokens", "section_end_tokens"),
)
BY_HAND = (
    "say --memento-im-start-token, --memento-assistant-token (empty where the first token is the "
    "whole header) and --memento-im-end-token, or give the model such tokens (memento init-model "
    "with a template of this project does)"
)
_RENDERING = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template raises on messages that it does not take: jinja evaluates Python expressions."""


class Render(Protocol):
    """A chat template with the special tokens of its tokenizer."""

    def __call__(self, *, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str: ...


class Markup(NamedTuple):
    """Texts of what opens and closes an assistant section; `opening` is the whole generation
    prompt, white space included."""

    im_start: str
    assistant: str
    im_end: str
    section_starts: tuple[str, ...]
    section_ends: tuple[str, ...]
    opening: str

    @property
    def options(self) -> dict[str, str]:
        """The options of `MementoConfig` that say this."""
        texts = (self.im_start, self.assistant, self.im_end)
        more = (" ".join(self.section_starts), " ".join(self.section_ends))
        return dict(zip(OPTIONS, (*texts, *more), strict=True))


def learn(render: Render, added: Collection[str]) -> Markup:
    """The markup of a template.

    Args:
        added: texts of the tokens that a tokenizer finds in a text before it cuts the rest.

    Raises:
        MarkerError: it cannot be told from the template.
    """
    history = _turns(USER, SAID, ASKED, ANSWER)
    try:
        told = render(messages=history, add_generation_prompt=False)
        asking = render(messages=history[:3], add_generation_prompt=True)
        asked = render(messages=history[:3], add_generation_prompt=False)
    except _RENDERING as error:
        raise _unlearned(f"it refuses a plain conversation ({_first_line(error)})") from None
    if any(told.count(word) != 1 for word in (USER, SAID, ASKED, ANSWER)):
        raise _unlearned("it does not show each message once")
    turn = told.partition(SAID)[2].partition(ASKED)[0]
    opening = asking.partition(ASKED)[2]
    common = _common(told.partition(ASKED)[2].partition(ANSWER)[0], opening)
    user_end = asked.partition(ASKED)[2]
    rest = common.removeprefix(user_end)
    if header := rest.strip():  # else the user's turn ends in what opens the assistant's
        opening = opening.removeprefix(user_end)
    else:
        header = common.strip()
    im_start = max((t for t in added if header.startswith(t)), key=len, default="")
    if not im_start:
        raise _unlearned(
            f"the assistant's turn begins with {shown(header)}, which is no token of its own"
            if header
            else "nothing stands before what the assistant says"
        )
    before, shared, user = turn.partition(im_start)
    assistant = _name(header[len(im_start) :], user, added) if shared else ""
    ends = _found(before, added)
    if not ends:
        raise _unlearned(f"no token ends the assistant's turn ({shown(before)})")
    starts = [t for t in _after_tools(render, im_start, added) if t not in ends]
    return Markup(im_start, assistant, ends[0], tuple(starts), tuple(ends[1:]), opening)


def _common(one: str, other: str) -> str:
    """The beginning that two texts share."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def _turns(*words: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": word} for n, word in enumerate(words)]


def _unlearned(why: str) -> MarkerError:
    return MarkerError(
        f"the chat markup cannot be learned from the chat template: {why}: {BY_HAND}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _name(text: str, user: str, added: Collection[str]) -> str:
    """The role at the start of `text`, which stands behind the token that opens every turn."""
    first = max((t for t in added if text.startswith(t)), key=len, default="")
    name = first or re.split(r"\s", _before_any(text, added))[0]
    if not name or user.startswith(name):
        raise _unlearned(f"no role is told behind the token that opens a turn ({shown(text)})")
    return name


def _before_any(text: str, added: Collection[str]) -> str:
    return text[: min((at for t in added if (at := text.find(t)) >= 0), default=len(text))]


def _found(text: str, added: Collection[str]) -> list[str]:
    """The added tokens in a text, each once."""
    longest = sorted((t for t in added if t in text and t.strip()), key=len, reverse=True)
    if not longest:
        return []
    return list(dict.fromkeys(re.findall("|".join(map(re.escape, longest)), text)))


def _after_tools(render: Render, im_start: str, added: Collection[str]) -> list[str]:
    """The token behind a tool's result where the assistant then speaks without a header."""
    for arguments in ('{"x": 1}', {"x": 1}):  # templates want the one or the other
        call = {
            "id": "call00001",
            "type": "function",
            "function": {"name": "f", "arguments": arguments},
        }
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": USER},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": RESULT, "tool_call_id": "call00001", "name": "f"},
            {"role": "assistant", "content": ANSWER},
        ]
        try:
            told = render(messages=messages, add_generation_prompt=False)
        except _RENDERING as error:
            logger.debug("memento: the chat template has no tool turns: %s", _first_line(error))
            continue
        if told.count(RESULT) != 1 or told.count(ANSWER) != 1:
            continue
        between = told.partition(RESULT)[2].partition(ANSWER)[0]
        return [] if im_start in between else _found(between, added)[-1:]
    return []


def settle_markup(
    config: MementoConfig, render: Render | None, source: str, added: Collection[str]
) -> tuple[MementoConfig, Markup | None]:
    """`config` with the markup of a chat template, unless the options say one by hand.

    Args:
        render: the template; None: there is none.
        source: its text.

    Returns:
        The options, and what was learned; None where nothing was.

    Raises:
        MarkerError: it cannot be learned, and is not that of the options' defaults.
    """
    said = config.model_fields_set.intersection(OPTIONS)
    if not config.require_assistant_section or render is None or said:
        return config, None
    try:
        markup = learn(render, added)
    except MarkerError as error:
        if config.im_start_token in source and config.im_start_token in added:
            logger.warning("memento: %s; using %s", error, config.im_start_token)
            return config, None
        raise
    return config.model_copy(update=markup.options), markup


def resolve_checked(
    config: MementoConfig,
    markup: Markup | None,
    tokenizer: Tokenizer | None,
    vocabulary: int | None = None,
) -> MarkerIds:
    """The tokens of all markers (`resolve_markers`), after `settle_markup`; the header, if it was
    learned, is that of a rendered prompt.

    Raises:
        MarkerError: see `resolve_markers` and `check_header`.
    """
    markers = resolve_markers(config, tokenizer, vocabulary)
    if markup is not None:
        assert tokenizer is not None  # there was no template otherwise
        check_header(markers, markup, tokenizer)
    return markers


def check_header(markers: MarkerIds, markup: Markup, tokenizer: Tokenizer) -> None:
    """Check that the tokens of a header are those that a rendered prompt has.

    Raises:
        MarkerError: they are others, where white space or words stand around them.
    """
    for text in (markup.opening, f"{USER}{markup.im_end}\n{markup.opening}"):
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        if not stands_in(markers.header, ids):
            raise MarkerError(
                f"the assistant's header {list(markers.header)} is not in the tokens of the "
                f"generation prompt {shown(markup.opening)}: {ids[-MOST_TOKENS:]}: {BY_HAND}"
            )


def stands_in(wanted: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether a sequence of tokens stands in another."""
    size = len(wanted)
    return any(tuple(ids[n : n + size]) == tuple(wanted) for n in range(len(ids) - size + 1))
