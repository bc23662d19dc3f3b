"""What a user reads whose request does not fit the KV pool, with what to change. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence

from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig

REMEDY = (
    "give the server more KV memory (--mem-fraction-static, --max-total-tokens), let it evict "
    "earlier (keep_last_n_blocks, max_block_tokens), or make the request shorter"
)


def outgrown_message(state: RequestState, output: Sequence[int], pool: int) -> str:
    """Why a request ended that ran alone and found no slot for its next token."""
    length = state.prompt_len + len(output)
    held = state.rows_replayed(length)
    return (
        f"memento: out of KV memory: alone this request holds {held} of {pool} slots (prompt "
        f"{state.prompt_len}, output {len(output)}, evicted {length - held} tokens; "
        f"{_options(state.config)}): {REMEDY}"
    )


def too_long_message(state: RequestState, output: Sequence[int], pool: int) -> str:
    """Why a prompt (with what had been written, after a retraction) can never be read."""
    length = state.prompt_len + len(output)
    return (
        f"memento: {length} tokens of prompt do not fit: at once they take "
        f"{state.peak_rows(length)} slots and the KV pool has {pool} "
        f"({_options(state.config)}): {REMEDY}"
    )


def _options(config: MementoConfig) -> str:
    if not config.evicts:
        return "nothing is evicted"
    return (
        f"keep_last_n_blocks={config.keep_last_n_blocks}, "
        f"max_block_tokens={config.max_block_tokens}, "
        f"max_summary_tokens={config.max_summary_tokens}"
    )
