"""Texts of tokens: joined they are the whole text, whatever the tokenizer does to bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memento_sgl.errors import ConfigError, DataError
from memento_sgl.offline.inputs.tokens import TextTokenizer

TEXTS = [
    "Plain words, and more words.",
    "déjà vu, naïve façade",
    "数学 and 🙂🙃 emoji 👩‍🚀",
    "a\n\n  b\tc",
]


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TextTokenizer:
    inner = Tokenizer(models.BPE(unk_token=None))
    alphabet: list[str] = []
    if request.param == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        inner.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    inner.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


def test_pieces_joined_are_the_text(tokenizer: TextTokenizer) -> None:
    for text in TEXTS:
        ids, parts = tokenizer.split(text)
        assert ids == tokenizer.encode(text)
        assert len(parts) == len(ids)
        assert "".join(parts) == text
        again = tokenizer.pieces(ids)
        assert len(again) == len(ids)
        assert "".join(again) == text


def test_any_ids_have_pieces(tokenizer: TextTokenizer) -> None:
    """Characters cut in two by the end, or never completed at all."""
    rng = random.Random(5)
    known = sorted({token for text in TEXTS for token in tokenizer.encode(text)})
    for _ in range(300):
        ids = rng.choices(known, k=rng.randint(1, 12))
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def test_no_tokens_and_unknown_ones(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert tokenizer.split("") == ([], [])
    assert tokenizer.pieces([]) == []
    with pytest.raises(DataError, match="token id 99999 is not in"):
        tokenizer.pieces([1, 99999])
    with pytest.raises(ConfigError, match="no tokenizer at"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        TextTokenizer(tmp_path)
