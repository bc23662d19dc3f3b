"""The text of one stream, cut into events: incremental, lossless, no I/O.

Every decision about blocks is the rule's own (`memento_sgl.rule.machine`): the parser finds marker
strings and feeds a `BlockMachine` one made-up token for each marker and each other character.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from memento_frontend import events as e
from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine, Eviction, Phase, State
from memento_sgl.rule.markers import MarkerIds, TokenClass

INSIDE = (State.BLOCK, State.CLOSED, State.MEMENTO)
TAGS = ("think_start", "think_end")
BLOCK_MARKERS = ("block_start", "block_end", "summary_start", "summary_end")

Locate = Callable[[TokenClass, bool], int | None]
"""Which output token (1: the first) the marker just read is. The flag tells that nothing follows
it in what was fed so far. None: not known."""


class TextParser:
    """Follows the text of one choice; it begins outside of any block.

    Args:
        config: marker strings, and the server's options if evictions are to be told as they
            happen (`enable=True`; blocks of the prompt are not seen). Default: evictions unknown.
        in_thought: the prompt ends with an open `<think>`.
        locate: see `Locate`.

    Text cannot tell a marker token from the same characters spelled out.

    Raises:
        ConfigError: a marker is given as a token id, or two markers are the same.
    """

    def __init__(
        self,
        config: MementoConfig | None = None,
        *,
        in_thought: bool = False,
        locate: Locate = lambda _cls, _at_end: None,
    ) -> None:
        self._config = config or MementoConfig()
        self._locate = locate
        self._classes = _marker_strings(self._config)
        self._names = sorted(self._classes, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)))
        settled = {"mask_delimiters": self._config.mask_delimiters is True}
        self._machine = BlockMachine(
            _made_up(self._config),
            self._config.model_copy(update=settled),
            section_start=0,
        )
        self._index = 0  # of the next made-up token
        self._pending = ""
        self._phase = Phase.THOUGHT if in_thought else Phase.BEFORE
        self._blank = True  # nothing but white space so far
        self._left = False  # </think> came inside the open block or memento
        self._reasoning = False  # the channel of the last piece
        self._separated = False  # the server separates reasoning from content
        self._opened: int | None = None  # output token that opened the current part
        self._block_tokens: int | None = None
        self._sizes: list[int | None] = []  # tokens of the finished blocks

    def feed(self, text: str, *, reasoning: bool = False) -> list[e.Event]:
        """Take the next piece: raw text or `content`, or with `reasoning` the server's
        `reasoning_content`."""
        out = self._switch(reasoning) if reasoning != self._reasoning and text else []
        self._pending += text
        return out + self._advance(final=False)

    def end(self) -> list[e.Event]:
        """The text is over: what was held back as the possible start of a marker is text."""
        return self._advance(final=True)

    def _switch(self, reasoning: bool) -> list[e.Event]:
        out = self._advance(final=True)
        self._reasoning = reasoning
        self._separated = True
        if reasoning and self._phase is not Phase.THOUGHT:
            self._phase = Phase.THOUGHT
            out.append(e.ThoughtOpened(""))
        elif not reasoning and self._phase is Phase.THOUGHT:
            out.append(self._close_thought(""))
        return out

    def _advance(self, *, final: bool) -> list[e.Event]:
        """Use up the pending text, except for an end that may become a marker."""
        out: list[e.Event] = []
        while self._pending:
            if self._machine.state_before(self._index) is State.ROLE:
                name = self._config.assistant_token
                if not final and name.startswith(self._pending) and name != self._pending:
                    break
                out += self._role()
                continue
            held = len(self._pending) if final else self._possible_marker()
            match = self._pattern.search(self._pending)
            if match is None or match.start() >= held:
                out += self._plain(self._take(held))
                break
            out += self._plain(self._take(match.start()))
            out += self._name(self._take(len(match[0])))
        return out

    def _possible_marker(self) -> int:
        """Where the pending text's earliest end begins that could grow into a (longer) marker."""
        longest = len(self._names[0]) - 1
        for start in range(max(0, len(self._pending) - longest), len(self._pending)):
            tail = self._pending[start:]
            if any(name.startswith(tail) and name != tail for name in self._names):
                return start
        return len(self._pending)

    def _take(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        return text

    def _role(self) -> list[e.Event]:
        """What directly follows <|im_start|>: the assistant's name, or else another's turn."""
        name = self._config.assistant_token
        if not self._pending.startswith(name):
            self._machine.feed(self._index, TokenClass.OTHER)
            return []
        self._machine.feed(self._index, TokenClass.ASSISTANT)
        self._index += 1
        return [e.OtherMarker(self._take(len(name)))]

    def _plain(self, text: str) -> list[e.Event]:
        if not text:
            return []
        state = self._machine.state_before(self._index)
        self._index += len(text)
        self._blank = self._blank and text.isspace()
        number = len(self._machine.blocks)
        if state is State.BLOCK and not self._left:
            return [e.BlockText(text, number)]
        if state is State.MEMENTO and not self._left:
            return [e.MementoText(text, number)]
        return [e.ThoughtText(text) if self._phase is Phase.THOUGHT else e.AnswerText(text)]

    def _name(self, text: str) -> list[e.Event]:
        """A marker or a think tag."""
        cls = self._classes[text]
        if cls not in (TokenClass.THINK_START, TokenClass.THINK_END):
            return self._marker(text, cls)
        if self._separated:
            return self._plain(text)
        if cls is TokenClass.THINK_START and self._blank:
            self._phase, self._blank = Phase.THOUGHT, False
            return [e.ThoughtOpened(text)]
        if cls is TokenClass.THINK_END and self._phase is not Phase.ANSWER:
            return [self._close_thought(text)]
        return self._plain(text)

    def _close_thought(self, text: str) -> e.Event:
        # The rule does not know </think>: an open block stays open, but this is the answer now.
        self._phase, self._blank = Phase.ANSWER, False
        self._left = True
        return e.ThoughtClosed(text)

    def _marker(self, text: str, cls: TokenClass) -> list[e.Event]:
        position = self._locate(cls, not self._pending) if cls <= TokenClass.SUMMARY_END else None
        before = self._machine.state_before(self._index)
        number = len(self._machine.blocks)
        due = self._machine.feed(self._index, cls)
        after = self._machine.state
        self._index += 1
        self._blank = False
        out: list[e.Event] = []
        opens = cls is TokenClass.BLOCK_START and after is State.BLOCK
        section = self._machine.classes.get(cls) is TokenClass.SECTION
        if before in INSIDE and (opens or section or after in (State.ROLE, State.NO_SECTION)):
            out.append(e.BlockAbandoned("", number))
        if opens and self._phase is Phase.BEFORE:
            self._phase = Phase.THOUGHT
            out.append(e.ThoughtOpened(""))
        if section:
            self._opened, self._left = None, False
            out.append(e.OtherMarker(text))
        elif opens or after is not before:
            out.append(self._boundary(text, after, number, position))
        elif before is State.BLOCK and not self._left:
            out.append(e.BlockText(text, number))
        elif before is State.MEMENTO and not self._left:
            out.append(e.MementoText(text, number))
        else:
            out.append(e.OtherMarker(text))
        return [*out, self._evicted(due)] if due else out

    def _boundary(self, text: str, after: State, number: int, position: int | None) -> e.Event:
        """The event of a marker that took the rule to another state (or block)."""
        size = None
        if position is not None and self._opened is not None:
            size = position - self._opened - 1
        self._opened = position
        self._left = False
        if after is State.BLOCK:
            return e.BlockOpened(text, number)
        if after is State.CLOSED:
            self._block_tokens = size
            return e.BlockClosed(text, number, size)
        if after is State.MEMENTO:
            return e.MementoOpened(text, number)
        if after is State.OUTSIDE:  # from a memento: <|im_start|> leads elsewhere
            self._sizes.append(self._block_tokens)
            return e.MementoClosed(text, number, size)
        return e.OtherMarker(text)

    def _evicted(self, due: Eviction) -> e.Event:
        starts = [block.start for block in self._machine.blocks]
        markers_go = self._config.restart_mode or self._config.mask_delimiters
        number = starts.index(due.start if markers_go is True else due.start - 1)
        size = self._sizes[number]
        if size is None or markers_go == "auto":
            return e.BlockEvicted("", number, None)
        return e.BlockEvicted("", number, size + 2 * markers_go)


def _made_up(config: MementoConfig) -> MarkerIds:
    """Each class stands for its token."""
    markers = MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9, section_starts=(TokenClass.SECTION,))
    return markers if config.assistant_token else markers._replace(assistant=None)


def _marker_strings(config: MementoConfig) -> dict[str, TokenClass]:
    names = [*BLOCK_MARKERS, *TAGS]
    if config.require_assistant_section:
        names += ["im_start", "im_end"]
    pairs = [(getattr(config, f"{name}_token"), TokenClass[name.upper()]) for name in names]
    if config.require_assistant_section:
        pairs += [(text, TokenClass.SECTION) for text in config.section_start_tokens.split()]
        pairs += [(text, TokenClass.IM_END) for text in config.section_end_tokens.split()]
    strings = dict(pairs)
    if len(strings) < len(pairs):
        raise ConfigError("two markers are the same string")
    for string in strings:
        if string.isascii() and string.isdecimal():
            raise ConfigError(f"a text stream needs the marker's text, not its token id {string}")
    return strings
