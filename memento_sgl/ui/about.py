"""What the page has to know of a server, once and while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from memento_sgl.rule.config import MementoConfig

Kind = Literal["memento", "sglang", "openai"]

TOLD = (
    "enable",
    "keep_last_n_blocks",
    "mask_delimiters",
    "compact_on_summary_end",
    "require_assistant_section",
    "keep_last_block_for_answer",
    "restart_mode",
    "constrain",
    "max_block_tokens",
    "max_summary_tokens",
    "min_block_tokens",
    "min_summary_tokens",
    "max_blocks",
    "min_blocks",
    "block_start_token",
    "block_end_token",
    "summary_start_token",
    "summary_end_token",
    "im_start_token",
    "im_end_token",
    "assistant_token",
    "section_start_tokens",
    "section_end_tokens",
    "think_start_token",
    "think_end_token",
)
"""Options that a page needs to follow an answer, or may show; no paths of the server."""

LOADS = {
    "running": "num_running_reqs",
    "waiting": "num_waiting_reqs",
    "held": "num_used_tokens",
    "capacity": "max_total_num_tokens",
}
"""Fields of the page by those of SGLang's load snapshots."""


def describe(models: Sequence[str], kind: Kind, options: MementoConfig | None) -> dict[str, Any]:
    """What `/memento/about` answers.

    `options` are those of the server; None: it tells none, or evicts nothing.
    """
    told = None if options is None else options.model_dump(include=set(TOLD))
    return {"models": list(models), "kind": kind, "options": told}


def load(snapshots: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What `/memento/stats` answers: sums over data-parallel ranks.

    Args:
        snapshots: SGLang's, one per rank; `memento` in them are evictions since the start and
            tokens that the rows of running requests miss now.

    The last two are None for a server without eviction; all are where it tells no load at all.
    """
    ranks = list(snapshots)
    told: dict[str, Any] = {
        name: sum(rank[field] for rank in ranks) if ranks else None for name, field in LOADS.items()
    }
    known = [rank["memento"] for rank in ranks if rank.get("memento") is not None]
    all_known = known and len(known) == len(ranks)
    for number, name in enumerate(("evictions", "missing")):
        told[name] = sum(pair[number] for pair in known) if all_known else None
    return told
