"""Seam: constraints that wait for the end of the thought, with every grammar backend."""

from __future__ import annotations

from typing import Any


def before_reasoner_init(_reasoner: Any, grammar_backend: Any, *_args: Any, **_kwargs: Any) -> None:
    """Upstream takes these from the backend although only xgrammar has them there; they serve
    requests without a grammar, which strict thinking alone makes."""
    for name in ("allocate_vocab_mask", "move_vocab_mask", "apply_vocab_mask"):
        if not hasattr(grammar_backend, name):
            setattr(grammar_backend, name, None)
