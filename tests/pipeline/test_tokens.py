from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memento_pipeline.text.tokens import APPROX, ApproxCounter, count, count_between, load_counter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memento_sgl.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the sum of two numbers is the number"] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@given(st.text())
def test_approximation_covers_every_character(text: str) -> None:
    starts = ApproxCounter().starts(text)
    assert list(starts) == sorted(set(starts))
    assert (len(starts) == 0) == (text == "")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("The sum", 2), ("12345", 5), ("x = 2", 4), ("你好", 2), ("a\n\nb", 3), ("_", 1)],
)
def test_approximation_is_fixed(text: str, tokens: int) -> None:
    assert count(load_counter(), text) == tokens
    assert load_counter().name == load_counter("approx-1").name == APPROX


@given(st.text(alphabet="the sum é👩你", max_size=60), st.data())
def test_parts_sum_to_the_whole(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    edges = [0, *sorted(cuts), len(text)]
    assert sum(count_between(ApproxCounter(), text, edges)) == count(ApproxCounter(), text)


def test_a_real_tokenizer_counts_by_character_offsets(folder: Path) -> None:
    counter = load_counter(folder)
    text = "the number é👩 the sum"
    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text)
    assert count(counter, text) == len(encoding.ids)
    assert np.all(np.diff(counter.starts(text)) >= 0)
    where = text.index("👩")
    left, right = count_between(counter, text, [0, where, len(text)])
    assert right == sum(start >= where for start, _ in encoding.offsets)
    assert left + right == len(encoding.ids)
    assert counter.name == f"{folder.name}/tokenizer.json"


def test_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_counter(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        load_counter(tmp_path)
