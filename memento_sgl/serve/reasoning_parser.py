"""The reasoning parser `memento` of SGLang's OpenAI interface, over `thought.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.parser.reasoning_parser import (
    Qwen3Detector,
    ReasoningParser,
    StreamingParseResult,
)

from memento_sgl.rule.config import MementoConfig
from memento_sgl.serve.arguments import REASONING_PARSER
from memento_sgl.serve.thought import ThoughtSplitter


class MementoDetector(Qwen3Detector):  # type: ignore[misc]
    """Reasoning parser for Memento models; one object per answer.

    Tags, and who decides whether a request thinks, are as for Qwen3. Unlike there, an answer that
    starts with neither `<think>` nor a block is content, unless the prompt opened the thought.
    """

    config = MementoConfig()
    """Names the tags and markers; a subclass per server, since SGLang registers classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        config = self.config
        self.think_start_token = config.think_start_token
        self.think_end_token = config.think_end_token
        markers = (
            config.block_start_token,
            config.block_end_token,
            config.summary_start_token,
            config.summary_end_token,
        )
        self.adapt(markers, show_markers=False, opened=False)

    def adapt(self, markers: Sequence[str], *, show_markers: bool, opened: bool) -> None:
        """Set what depends on server, request and prompt; before any text.

        Args:
            markers: texts of the block and memento markers, the one that opens a block first.
            show_markers: leave them in the reasoning.
            opened: the prompt ends with `<think>`.
        """
        self._markers, self._show_markers, self._opened = markers, show_markers, opened
        self._splitter = self._new_splitter()
        self._unsent = ""

    def _new_splitter(self) -> ThoughtSplitter:
        hidden = () if self._show_markers else self._markers
        return ThoughtSplitter(
            self._markers[0],
            hidden,
            think=(self.think_start_token, self.think_end_token),
            opened=self._opened,
            before=self.previous_content,
        )

    def _detect_and_parse_impl(self, text: str) -> StreamingParseResult:
        splitter = self._new_splitter()
        first, last = splitter.push(text), splitter.close()
        return StreamingParseResult(first.content + last.content, first.thought + last.thought)

    def _parse_streaming_increment_impl(self, new_text: str) -> StreamingParseResult:
        piece = self._splitter.push(new_text)
        self._in_reasoning = not self._splitter.answering
        thought = self._unsent + piece.thought
        if self.stream_reasoning or self._splitter.answering:
            self._unsent = ""
            return StreamingParseResult(piece.content, thought)
        self._unsent = thought
        return StreamingParseResult()

    def finish(self) -> StreamingParseResult:
        """What was held back when the stream ends."""
        piece = self._splitter.close()
        thought, self._unsent = self._unsent + piece.thought, ""
        if self._force_nonempty_content and not self._splitter.answering:
            return StreamingParseResult(self._accumulated_reasoning + thought + piece.content)
        return StreamingParseResult(piece.content, thought)


def register_parser(config: MementoConfig | None = None) -> None:
    """Make `--reasoning-parser memento` known to SGLang in this process.

    Args:
        config: names the tags and markers; None until the options are known.
    """
    named = {"config": config or MementoConfig()}
    ReasoningParser.DetectorMap[REASONING_PARSER] = type("Registered", (MementoDetector,), named)
