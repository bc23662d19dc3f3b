"""The `Reasoning` of a program: many calls told as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memento_frontend.collect import collect
from memento_frontend.native import NativeClient
from memento_frontend.results import Reasoning
from memento_frontend.stream import GenerateParser, read
from memento_sgl.rule.accounting import kv_curve
from memento_sgl.rule.machine import Eviction


def parser(client: NativeClient, prompt_text: str) -> GenerateParser:
    """A parser for what follows this prompt. Evictions come from the server's record: only the
    server knows all options in force."""
    config = client.config.model_copy(update={"enable": False})
    in_thought = prompt_text.rstrip().endswith("<think>")
    return GenerateParser(config, in_thought=in_thought, markers=client.markers)


def assemble(
    client: NativeClient, prompt_text: str, text: str, ids: Sequence[int], meta: dict[str, Any]
) -> Reasoning:
    """Take apart what a program wrote behind its prompt.

    Args:
        text, ids: all of it; markers included, without the end-of-sequence token in the text.
        meta: `prompt_tokens`, `completion_tokens`, `finish_reason` and `memento` of the whole.
    """
    chunk = {"text": text, "output_ids": list(ids), "meta_info": meta}
    return collect(read([chunk], parser(client, prompt_text)))


def whole_record(last: dict[str, Any], prompt_len: int, length: int) -> dict[str, Any]:
    """The accounting of `length` tokens, `prompt_len` of them given, from that of the last call.

    That one knows all blocks and spans; only its sums over steps begin with its own prompt.
    """
    spans = zip(last["evicted_spans"], last["eviction_points"], strict=True)
    evictions = [Eviction(point, start, end, point) for (start, end), point in spans]
    first = max(prompt_len - 1, 0)  # the query that gives the first output token
    queries = max(length - 1, 0)
    return {
        **last,
        "kv_auc": sum(kv_curve(evictions, queries)[first:]),
        "kv_auc_without": sum(kv_curve([], queries)[first:]),
    }
