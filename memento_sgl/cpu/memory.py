"""How much memory a server on a CPU takes by default: what its model can use, not all there is.

SGLang gives a CPU server most of the machine's memory. That is right for a machine of its own; here
a CPU is where things are tried out, beside everything else.
"""

from __future__ import annotations

from typing import NamedTuple

KV_BYTES = 256 * 2**20
RUNNING = 32  # requests


class Memory(NamedTuple):
    """Defaults of `--max-total-tokens` and `--max-running-requests`."""

    tokens: int
    running: int


def default_memory(token_bytes: float, context: int, running: int | None = None) -> Memory:
    """At most `KV_BYTES` of KV, and no more than that many requests of full length could hold.

    Args:
        token_bytes: of one token's KV.
        context: longest request in tokens.
        running: requests at once, if the user says.
    """
    requests = running or RUNNING
    return Memory(max(1, min(int(KV_BYTES // token_bytes), requests * context)), requests)


def describe(memory: Memory, token_bytes: float) -> str:
    """One line for the log."""
    size = memory.tokens * token_bytes / 2**20
    return (
        f"memento: on this CPU {memory.tokens:,} KV tokens ({size:,.0f} MiB) for "
        f"{memory.running} requests at once; --max-total-tokens and --max-running-requests "
        "say otherwise"
    )
