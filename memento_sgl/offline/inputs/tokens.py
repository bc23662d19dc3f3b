"""Text and token ids by a Hugging Face `tokenizer.json`, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders

from memento_sgl.chat_template import renderer, special_tokens_of, template_of_folder
from memento_sgl.errors import ConfigError, DataError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markup import Markup, settle_markup


class TextTokenizer:
    """A tokenizer file; has the two methods by which `resolve_markers` looks markers up.

    Args:
        path: tokenizer.json or a folder that holds one.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        file = tokenizer_file(path).resolve()
        self.name = f"{file.parent.name}/{file.name}"
        self.folder = file.parent
        self._tokenizer = load_tokenizer(file)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return str(self._tokenizer.id_to_token(ids))

    @cached_property
    def added(self) -> frozenset[str]:
        """Texts of the tokens that are found before the rest is cut."""
        return frozenset(t.content for t in self._tokenizer.get_added_tokens_decoder().values())

    def own_markup(self, config: MementoConfig) -> tuple[MementoConfig, Markup | None]:
        """`config` with the markup of the chat template that lies beside the file, as a server of
        that folder learns it; see `settle_markup`.

        Raises:
            ConfigError: the template is not valid.
            MarkerError: its markup cannot be learned.
        """
        source = template_of_folder(self.folder)
        render = None if source is None else renderer(source, special_tokens_of(self.folder))
        return settle_markup(config, render, source or "", self.added)

    def split(self, text: str) -> tuple[list[int], list[str]]:
        """Ids of `text` and the part of it that each stands for; the parts joined are `text`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        edges = [0]
        for start, _ in encoding.offsets[1:]:
            edges.append(max(start, edges[-1]))
        edges.append(len(text))
        ids = list(encoding.ids)
        return ids, [text[edges[i] : edges[i + 1]] for i in range(len(ids))]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; empty where a character is not complete yet.

        Raises:
            DataError: an id that this tokenizer does not have.
        """
        for token in dict.fromkeys(ids):
            if self._tokenizer.id_to_token(token) is None:
                raise DataError(f"token id {token} is not in {self.name}: give the right tokenizer")
        stream = decoders.DecodeStream(skip_special_tokens=False)
        parts = [stream.step(self._tokenizer, token) or "" for token in ids]
        whole = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        if parts:  # a character that the end cut in two
            parts[-1] += whole[len("".join(parts)) :]
        return parts


def tokenizer_file(path: Path) -> Path:
    """The `tokenizer.json` that `path` names, or holds if it is a folder.

    Raises:
        ConfigError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"no tokenizer at {path}: give a tokenizer.json or a folder that holds one"
        )
    return file


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` without padding or truncation.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare `Exception`
        raise ConfigError(f"cannot read the tokenizer {file}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
