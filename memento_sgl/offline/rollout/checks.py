"""What must hold between the fields of a rollout record. A broken rule is a ValueError that says
which field breaks it; pydantic hands it on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memento_sgl.errors import DataError
from memento_sgl.rule.accounting import account
from memento_sgl.rule.emission import Permitted
from memento_sgl.rule.machine import BlockMachine, Eviction

Span = tuple[int, int]


def check_accounting(
    meta: Mapping[str, Any], machine: BlockMachine, prompt_len: int, length: int
) -> None:
    """The server's own record must be what the rule gives for these tokens and options.

    Args:
        meta: `meta_info` of the answer.
        machine: after all tokens.

    Raises:
        DataError: with the first figure that differs.
    """
    if meta.get("prompt_tokens", prompt_len) != prompt_len:
        raise DataError(
            f"the answer is to a prompt of {meta['prompt_tokens']} tokens, not {prompt_len}"
        )
    record = meta.get("memento")
    if record is None:
        if machine.evictions:
            raise DataError(
                'the answer has no meta_info["memento"]: was it made with --enable-memento and '
                "without enable=false? Say so in `config` or `options`"
            )
        return
    expected = json.loads(json.dumps(account(machine, prompt_len, length).as_dict()))
    found = json.loads(json.dumps(record))  # in one process spans are tuples
    for name, value in expected.items():
        if found.get(name) != value:
            raise DataError(
                f"the server's {name}={found.get(name)} is not what these options give ({value}): "
                "pass the server's MementoConfig as `config`, the request's overrides as `options`"
            )


def check_permitted(
    runs: Sequence[tuple[int, int, Permitted]],
    tokens: Sequence[int],
    special_ids: Sequence[int],
    prompt_len: int,
) -> None:
    """Runs `[start, end)` cover the output, and every token was permitted in its own."""
    special, last = set(special_ids), prompt_len
    for number, (start, end, may) in enumerate(runs):
        if not last <= start < end <= len(tokens) or (number == 0 and start != last):
            raise ValueError(
                f"permitted[{number}] starts at {start}: entries begin at the first output token "
                f"({prompt_len}) and rise"
            )
        last = start
        for index, token in enumerate(tokens[start:end], start):
            if not (token in may.special if token in special else may.text):
                raise ValueError(f"token {token} at {index} was not permitted there")


def check_spans(tokens: list[int], blocks: list[Span], mementos: list[Span]) -> None:
    """Spans alternate inside the tokens, each kind between the same two markers."""
    if len(blocks) != len(mementos):
        raise ValueError(f"{len(blocks)} block_spans and {len(mementos)} memento_spans")
    last = 0
    for number, pair in enumerate(zip(blocks, mementos, strict=True)):
        for kind, (start, end) in zip(("block", "memento"), pair, strict=True):
            if not last < start <= end < len(tokens):
                raise ValueError(
                    f"{kind}_spans[{number}]={[start, end]} overlaps what is before it or leaves "
                    f"the {len(tokens)} tokens"
                )
            last = end + 1
    for kind, spans in (("block", blocks), ("memento", mementos)):
        ends = {(tokens[start - 1], tokens[end]) for start, end in spans}
        if len(ends) > 1:
            raise ValueError(
                f"{kind}_spans do not all stand between the same two marker tokens: {sorted(ends)}"
            )


def check_evictions(evictions: Sequence[Eviction], blocks: Sequence[Span], length: int) -> None:
    """Every eviction takes one block, after it ended, at rising points."""
    spans = set(blocks) | {(start - 1, end + 1) for start, end in blocks}
    last = -1
    for number, (point, start, end, resume) in enumerate(evictions):
        where = f"evictions[{number}]={[point, start, end, resume]}"
        if (start, end) not in spans:
            raise ValueError(f"{where} is not the span of a block, with or without its markers")
        if not end <= resume <= point < length:
            raise ValueError(f"{where}: needs end <= resume <= point < {length} tokens")
        if point <= last:
            raise ValueError(f"{where}: points must rise")
        last = point
