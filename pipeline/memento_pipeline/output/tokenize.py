"""Token ids of a row with the spans that the training mask needs.

    input_ids   [ prompt | <think> ⏎ bs BLOCK be ⏎ ss MEMENTO se ... </think> answer end ]
    labels      [  -100  | the same ids                                                 ]

Spans are half-open token ranges without their markers; evictions are `[point, start, end)` as in
`docs/semantics`: every query at or after `point` no longer sees `[start, end)`. They come from the
engine's own state machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from memento_pipeline.output.chat import ChatTemplate
from memento_sgl.errors import DataError, MarkerError
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay
from memento_sgl.rule.markup import resolve_checked

IGNORED = -100
"""Label of tokens that are not learned."""

_INTS = pa.list_(pa.int32())
TOKENIZED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", _INTS),
        ("labels", _INTS),
        ("prompt_tokens", pa.int32()),
        ("block_spans", pa.list_(_INTS)),
        ("memento_spans", pa.list_(_INTS)),
        ("evictions", pa.list_(_INTS)),
    ]
)


class Tokenized(NamedTuple):
    """See the module; all positions are indices into `input_ids`."""

    input_ids: list[int]
    labels: list[int]
    prompt_tokens: int
    block_spans: list[list[int]]
    memento_spans: list[list[int]]
    evictions: list[list[int]]


class RowTokenizer:
    """Tokenizes rows with one tokenizer and template.

    Args:
        path: tokenizer.json or its folder, with the four markers as tokens of their own.
        mask_delimiters: whether the model's convention evicts the block markers too.

    Raises:
        ConfigError: no tokenizer there.
        MarkerError: a marker is not exactly one token.
    """

    def __init__(self, path: Path, template: ChatTemplate, mask_delimiters: bool) -> None:
        self._tokenizer = TextTokenizer(path)
        self._template = template
        config = MementoConfig.parse({"enable": True, "mask_delimiters": mask_delimiters})
        try:
            config, markup = template.settle(config, self._tokenizer.added)
        except MarkerError:
            if template.chat_markup:
                raise
            # Turns that are plain text: the response alone counts, whatever stands in it.
            config = config.model_copy(update={"require_assistant_section": False})
            markup = None
        self._config = config
        self._markers = resolve_checked(config, markup, self._tokenizer)

    def tokenize(self, problem: str, response: str, blocks: int) -> Tokenized:
        """Ids, labels and spans of a row with this many blocks.

        Prompt and response are encoded apart, as they are at inference.

        Raises:
            DataError: the tokens do not show the expected blocks.
        """
        prompt, rest = self._template.render(problem, response)
        head, tail = self._tokenizer.encode(prompt), self._tokenizer.encode(rest)
        ids = head + tail
        machine = replay(ids, len(head), self._markers, self._config, assistant_start=len(head))
        if len(machine.blocks) != blocks:
            raise DataError(f"{len(machine.blocks)} blocks in the tokens, {blocks} in the row")
        return Tokenized(
            input_ids=ids,
            labels=[IGNORED] * len(head) + tail,
            prompt_tokens=len(head),
            block_spans=[[block.start + 1, block.end] for block in machine.blocks],
            memento_spans=[[b.summary_start + 1, b.summary_end] for b in machine.blocks],
            evictions=[[e.point, e.start, e.end] for e in machine.evictions],
        )
