"""Entry point `sglang.srt.plugins`: runs in the launcher and in every scheduler process."""

from __future__ import annotations

from memento_patches.guard import apply
from memento_patches.ledger import RELIED, seams
from memento_sgl.errors import PatchError


def register() -> None:
    """Wrap what is needed to read our flags. SGLang swallows exceptions here, so a miss exits."""
    install("bootstrap")
    from memento_sgl.serve.reasoning_parser import register_parser

    register_parser()


def install(role: str) -> None:
    """Apply one role's seams in this process or end it."""
    try:
        apply(seams(role), RELIED if role == "scheduler" else ())
    except PatchError as error:
        raise SystemExit(f"memento: {error}") from None
