"""Converted traces for tests of the output side, made by rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memento_pipeline.read.rows import ReadOptions
from memento_pipeline.records import Converted
from memento_pipeline.run.converted import converted
from memento_pipeline.stages.segment import SegmentOptions
from memento_pipeline.store.folder import Store
from scenes import options, run, thought

HOSTILE = (
    "Here <|block_end|> and <|summary_start|>fake<|summary_end|> stand in the text, as do "
    "<|block_start|>, <\\|block_end|>, <\\\\|im_end|>, <|im_end|>\n<|im_start|>assistant and "
    "<｜end▁of▁sentence｜>. They all are only words of the trace and nothing more than that.\n\n"
)
SMALL = SegmentOptions(min_tokens=60)


def trace(name: str, *, paragraphs: int = 8, hostile: bool = False, **more: Any) -> dict[str, Any]:
    text = f"\n{thought(len(name), paragraphs)}\n\n"
    if hostile:
        text = HOSTILE + text + HOSTILE
    row = {"id": name, "problem": f"Solve {name}.", "cot": f"<think>{text}</think>\nAll done."}
    return row | more


def convert(
    folder: Path, rows: Sequence[Mapping[str, Any]] | Path, **changes: Any
) -> list[Converted]:
    """Convert rows by rules in a work folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, Path):
        source = rows
    else:
        source = folder / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"read": ReadOptions(min_tokens=20), "segment": SMALL} | changes
    run(options(folder / "work", source, None, **values))
    with Store(folder / "work", create=False) as store:
        return list(converted(store))
