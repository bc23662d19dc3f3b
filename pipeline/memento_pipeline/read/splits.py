"""The split that a file of a dataset folder belongs to, by its name, as the Hugging Face Hub has
them: `data/train-00000-of-00002.parquet`, `test.jsonl`, `validation/x.arrow`."""

from __future__ import annotations

import re
from pathlib import Path

DEFAULT = "train"
ALL = "all"

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BY_WORD = {word: split for split, words in _NAMES.items() for word in words}
_WORD = re.compile(rf"(?:^|[\W_\d])({'|'.join(_BY_WORD)})(?=[\W_\d]|$)", re.IGNORECASE)
_SHARD = re.compile(r"^(\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-\w+)?\.", re.ASCII)
_NO_SPLIT = ("data", "part", "shard", "chunk", "output", "default")


def split_of(file: Path) -> str | None:
    """The split, or None where neither the file nor a folder above it names one.

    Args:
        file: relative to the dataset folder.
    """
    shard = _SHARD.match(file.name)
    if shard and shard[1].lower() not in _NO_SPLIT and not _WORD.search(shard[1]):
        return shard[1]
    for part in (file.name.partition(".")[0], *reversed(file.parent.parts)):
        if found := _WORD.search(part):
            return _BY_WORD[found[1].lower()]
    return None
