"""Token counts by a stated tokenizer, from one encoding of the whole text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memento_sgl.errors import ConfigError
from memento_sgl.offline.inputs.tokens import load_tokenizer, tokenizer_file

APPROX = "approx-1"
"""Name of the built-in approximation; the number changes whenever its counts do."""

# Up to nine letters with their leading space, single digits, short runs of punctuation, single CJK
# characters. Against a 150k byte-pair vocabulary this counts 3-8 % too many on English prose, math
# and code, and half as many again on Chinese. Bounded repeats keep it linear on any input.
_PIECE = re.compile(
    r" ?[A-Za-z]{1,9}|\d| ?[^\W\d_A-Za-z\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]{1,3}"
    r"|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]| ?[^\w\s]{1,2}|_|\s{1,16}?(?= \S)|\s{1,16}"
)


class TokenCounter(Protocol):
    """Counts tokens; `name` goes into every output, so that sizes can be interpreted."""

    @property
    def name(self) -> str: ...

    def starts(self, text: str) -> npt.NDArray[np.int64]:
        """Code-point offset at which each token of `text` starts, rising."""
        ...


class ApproxCounter:
    """A deterministic estimate by one regular expression; needs no file."""

    name = APPROX

    def starts(self, text: str) -> npt.NDArray[np.int64]:
        lengths = np.fromiter(map(len, _PIECE.findall(text)), dtype=np.int64)
        return np.cumsum(lengths) - lengths  # the pieces cover the text


class FileCounter:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        self.name = f"{path.parent.name}/{path.name}"
        self.tokenizer: Tokenizer = load_tokenizer(path)

    def starts(self, text: str) -> npt.NDArray[np.int64]:
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return np.fromiter((start for start, _ in offsets), dtype=np.int64, count=len(offsets))


def load_counter(source: str | Path | None = None) -> TokenCounter:
    """The counter for a `tokenizer.json` or its folder; None or "approx-1": the approximation."""
    if source is None or str(source) in (APPROX, "approx"):
        return ApproxCounter()
    try:
        return FileCounter(tokenizer_file(Path(source)))
    except ConfigError as error:
        raise ConfigError(f"{error}, or {APPROX!r} for the built-in approximation") from None


def count(counter: TokenCounter, text: str) -> int:
    """Tokens of `text` on its own."""
    return len(counter.starts(text))


def count_between(counter: TokenCounter, text: str, edges: Sequence[int]) -> list[int]:
    """Tokens that start in each `[edges[i], edges[i + 1])`, from one encoding of `text`."""
    places = np.searchsorted(counter.starts(text), np.asarray(edges, dtype=np.int64))
    return [int(n) for n in np.diff(places)]
