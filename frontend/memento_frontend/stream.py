"""Streams of OpenAI clients and of SGLang's `/generate`, turned into events.

One parser follows one choice; for `n` choices feed every chunk to `n` parsers. Nothing here does
I/O: the caller brings the chunks. docs/stream.md has a runnable example.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from memento_frontend import events as e
from memento_frontend.text_parser import TextParser
from memento_sgl.errors import ServerError
from memento_sgl.observe.recorder import read_records
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import MarkerIds, TokenClass

RECORD = "memento"  # key of the server's accounting


class Parser(Protocol):
    def feed(self, chunk: Any) -> list[e.Event]: ...
    def finish(self) -> list[e.Event]: ...


def read(chunks: Iterable[Any], parser: Parser) -> Iterator[e.Event]:
    """The events of a stream, ending with `Done`."""
    for chunk in chunks:
        yield from parser.feed(chunk)
    yield from parser.finish()


class _Choice:
    """What both kinds of stream have in common."""

    def __init__(self, config: MementoConfig | None, index: int, in_thought: bool) -> None:
        self._text = TextParser(config, in_thought=in_thought, locate=self._locate)
        self._index = index
        self._done = False
        self._finished = 0  # blocks
        self._evicted: set[int] = set()
        self._finish_reason: str | None = None
        self._record: dict[str, Any] | None = None
        self._ids: list[int] | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None

    def finish(self) -> list[e.Event]:
        """The stream is over, complete or not. `Done` comes once; later calls give nothing."""
        if self._done:
            return []
        self._done = True
        out = self._follow(self._text.end())
        out += self._evictions_on_record()
        ids = None if self._ids is None else tuple(self._ids)
        done = e.Done(
            "", self._finish_reason, self.prompt_tokens, self.output_tokens, self._record, ids
        )
        return [*out, done]

    def _follow(self, events: list[e.Event]) -> list[e.Event]:
        for event in events:
            if isinstance(event, e.MementoClosed):
                self._finished += 1
            elif isinstance(event, e.BlockEvicted):
                self._evicted.add(event.number)
        return events

    def _evictions_on_record(self) -> list[e.Event]:
        if self._record is None:
            return []
        sizes = self._record["block_tokens"]
        before = len(sizes) - self._finished  # finished blocks of the prompt
        if before < 0:
            return []
        # Blocks go in order, and empty ones have nothing to evict.
        numbers = [number - before for number, size in enumerate(sizes) if size]
        return [
            e.BlockEvicted("", number, end - start)
            for number, (start, end) in zip(numbers, self._record["evicted_spans"], strict=False)
            if number >= 0 and number not in self._evicted
        ]

    def _locate(self, cls: TokenClass, at_end: bool) -> int | None:
        raise NotImplementedError


class OpenAIParser(_Choice):
    """A streamed chat completion or completion: objects of the `openai` package or their JSON.

    Takes markers in `content` (a server without a reasoning parser), markers in
    `reasoning_content` (`custom_params: {"memento": {"show_markers": true}}`), and reasoning
    without markers, which is then plain thought text.

    A block's tokens are known at once where every chunk tells its usage (`stream_options:
    {"include_usage": true, "continuous_usage_stats": true}`) and its markers came in chunks of one
    token; else `Done.accounting` has them.

    Args:
        config, in_thought: see `TextParser`.
        index: the choice to follow.
    """

    def __init__(
        self, config: MementoConfig | None = None, *, index: int = 0, in_thought: bool = False
    ) -> None:
        super().__init__(config, index, in_thought)
        self._counted: int | None = 0  # output tokens up to the last piece of text
        self._newest: int | None = None  # output token that the current piece consists of
        self._several = False

    def feed(self, chunk: Any) -> list[e.Event]:
        """Take the next chunk.

        Raises:
            ServerError: the server broke the answer off, with its reason.
        """
        data = _plain(chunk)
        choices = data.get("choices") or []
        own = next((n for n, c in enumerate(choices) if c.get("index", 0) == self._index), None)
        self._several |= any(choice.get("index", 0) != self._index for choice in choices)
        usage = data.get("usage") or {}
        if own is None:
            if not choices and usage:
                self.prompt_tokens = usage["prompt_tokens"]
                if not self._several:  # else the sum of all choices
                    self.output_tokens = usage["completion_tokens"]
            return []
        if usage:
            self.prompt_tokens = usage["prompt_tokens"]
            self.output_tokens = usage["completion_tokens"]
        choice = choices[own]
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        records = read_records(data.get("metadata"))
        if records and choice.get("finish_reason"):
            self._record = records[own]
        return self._follow(self._pieces(choice, usage.get("completion_tokens")))

    def finish(self) -> list[e.Event]:
        if self._several and self._finish_reason is not None:
            # The last usage is the sum of all choices, and what chunks told lacks a last token
            # without text. The record covers all tokens but the last, which is never read.
            self.output_tokens = None
            if self._record is not None and self.prompt_tokens is not None:
                total = self._record["final_kv_tokens_without"] + 1
                self.output_tokens = total - self.prompt_tokens
        return super().finish()

    def _pieces(self, choice: dict[str, Any], counted: int | None) -> list[e.Event]:
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or choice.get("text") or ""
        if not reasoning and not content:
            return []
        one_is_new = counted is not None and counted - 1 == self._counted
        self._newest = counted if one_is_new else None
        self._counted = counted
        return self._text.feed(reasoning, reasoning=True) + self._text.feed(content)

    def _locate(self, cls: TokenClass, at_end: bool) -> int | None:
        # A marker is one token: when one token is new and the marker ends the text, it is this one.
        return self._newest if at_end else None


class GenerateParser(_Choice):
    """A stream of SGLang's native `/generate`: its `data:` objects.

    Args:
        config, in_thought: see `TextParser`.
        index: the choice to follow, with `n` above 1.
        markers: token ids of the markers (`memento_sgl.resolve_markers`); with them every block's
            tokens are known as soon as it closes.
        incremental: chunks hold only what is new (`--incremental-streaming-output`); None: seen
            from the token ids.
    """

    def __init__(
        self,
        config: MementoConfig | None = None,
        *,
        index: int = 0,
        in_thought: bool = False,
        markers: MarkerIds | None = None,
        incremental: bool | None = None,
    ) -> None:
        super().__init__(config, index, in_thought)
        self._classes = MarkerIds(*markers[:4]).classes if markers is not None else {}
        self._seen: deque[tuple[TokenClass, int]] = deque()  # marker tokens, with their place
        self._incremental = incremental
        self._length = 0  # characters

    def feed(self, chunk: dict[str, Any]) -> list[e.Event]:
        """Take the next chunk.

        Raises:
            ServerError: the server broke the answer off, with its reason, or sends no text.
        """
        data = _plain(chunk)
        if data.get("index", 0) != self._index:
            return []
        if "text" not in data:
            raise ServerError(
                "the stream has no text: start the server without --skip-tokenizer-init"
            )
        meta = data["meta_info"]
        self.prompt_tokens = meta.get("prompt_tokens", self.prompt_tokens)
        self.output_tokens = meta.get("completion_tokens", self.output_tokens)
        if (reason := meta.get("finish_reason")) is not None:
            self._finish_reason = reason["type"]
        self._record = meta.get(RECORD, self._record)
        only_new = self._only_new(data)
        self._take_ids(data.get("output_ids"), only_new)
        text = data["text"] if only_new else data["text"][self._length :]
        self._length += len(text)
        return self._follow(self._text.feed(text))

    def _only_new(self, data: dict[str, Any]) -> bool:
        if self._incremental is not None:
            return self._incremental
        counted = data["meta_info"].get("completion_tokens")
        ids = data.get("output_ids")
        return ids is not None and counted is not None and len(ids) < counted

    def _take_ids(self, ids: list[int] | None, only_new: bool) -> None:
        if ids is None:
            return
        if self._ids is None:
            self._ids = []
        for token in ids if only_new else ids[len(self._ids) :]:
            self._ids.append(token)
            if token in self._classes:
                self._seen.append((self._classes[token], len(self._ids)))

    def _locate(self, cls: TokenClass, at_end: bool) -> int | None:
        if not self._seen:
            return None
        found, position = self._seen.popleft()
        if found is not cls:  # the text spells markers out that are no tokens: no telling which
            self._classes, self._seen = {}, deque()
            return None
        return position


def _plain(chunk: Any) -> dict[str, Any]:
    data: dict[str, Any] = chunk if isinstance(chunk, dict) else chunk.model_dump()
    if error := data.get("error"):
        reason = error.get("message", error) if isinstance(error, dict) else error
        raise ServerError(f"the server broke off: {reason}")
    return data
