"""Marker tokens for tiny random checkpoints of several families, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from memento_pipeline.checkpoint.init_model import Initialised, init_model
from memento_pipeline.checkpoint.weights import read_header, rewrite
from memento_pipeline.text.pairs import MARKERS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError, DataError, MarkerError
from memento_sgl.rule.config import DELIMITERS_KEY, MementoConfig
from memento_sgl.rule.markers import resolve_markers
from memento_sgl.serve.sections import settle_sections
from memento_sgl.templates import template

WORDS = [
    "block",
    "start",
    "end",
    "summ",
    "ary",
    " ",
    "a",
    "b",
    "<|im_start|>",
    "<|im_end|>",
    "<|eos|>",
]
WORDS += [chr(code) for code in range(33, 127) if chr(code) not in "ab"]
WORDS += ["\n", "\t", *"≤é数学"]
SHAPE = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    **{"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 10},
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "qwen3-tied": (transformers.Qwen3Config, SHAPE | {"tie_word_embeddings": True}),
    "llama-untied": (transformers.LlamaConfig, SHAPE | {"tie_word_embeddings": False}),
    "llama-padded": (transformers.LlamaConfig, SHAPE | {"tie_word_embeddings": False, "spare": 9}),
    "qwen3-part-padded": (
        transformers.Qwen3Config,
        SHAPE | {"tie_word_embeddings": True, "spare": 2},
    ),
    "gpt2-tied": (transformers.GPT2Config, GPT2),
    "phi-bias": (transformers.PhiConfig, SHAPE | {"tie_word_embeddings": False}),
}
IDS = list(range(len(WORDS)))
NEW = (*MARKERS, "<think>", "</think>")


def build_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Cuts words into known pieces: "summary" is "summ" and "ary"."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    merges = []
    for word in [word for word in WORDS if len(word) > 1 and word.isalpha()]:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eos|>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "assistant", *extra])
    return tokenizer


def build(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    extra: tuple[str, ...] = (),
) -> Path:
    kind, values = FAMILIES[family]
    values = dict(values)
    tokenizer = build_tokenizer(extra)
    torch.manual_seed(0)
    config = kind(vocab_size=len(tokenizer) + values.pop("spare", 0), **values)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("as it is")
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def checked(source: Path, target: Path, done: Initialised) -> None:
    """Everything that must hold between the two checkpoints."""
    old, new = loaded(source), loaded(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    rows = old.get_input_embeddings().weight.shape[0]
    assert new.config.vocab_size == new.get_input_embeddings().weight.shape[0] == done.rows_after
    made = set(done.token_ids.values())
    kept = [row for row in range(rows) if row not in made]
    for name, parameter in new.named_parameters():
        before = old.get_parameter(name)
        if parameter.shape == before.shape and not {rows} & {parameter.shape[0]}:
            assert torch.equal(parameter, before), name
        else:
            assert torch.equal(parameter[kept], before[kept]), name
    tied = old.get_input_embeddings().weight is old.get_output_embeddings().weight
    assert done.tied is tied
    assert (new.get_input_embeddings().weight is new.get_output_embeddings().weight) is tied
    for marker, token in done.token_ids.items():
        words = {"</think>": "end think"}.get(marker, marker.strip("<|>").replace("_", " "))
        pieces = AutoTokenizer.from_pretrained(source).encode(words, add_special_tokens=False)
        assert len(pieces) > 1
        assert done.related[marker] == tokenizer.convert_ids_to_tokens(pieces)
        for matrix in (new.get_input_embeddings().weight, new.get_output_embeddings().weight):
            off = (matrix[token].float() - matrix[pieces].float().mean(0)).abs()
            assert 0 < off.max() < 0.06
        assert tokenizer.encode(marker, add_special_tokens=False) == [token]
        assert tokenizer.decode([token], skip_special_tokens=True) == marker
    resolve_markers(MementoConfig(enable=True, constrain="strict"), tokenizer)
    prompt = torch.tensor([IDS[:20]])
    with torch.no_grad():
        before, after = old(prompt).logits, new(prompt).logits
    assert torch.equal(before[..., kept], after[..., kept])
    assert tokenizer.chat_template == template("memento_nosys")
    assert (target / "LICENSE").read_text() == "as it is"


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    source = build(tmp_path / "src", family)
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    done = init_model(source, tmp_path / "dst")
    checked(source, tmp_path / "dst", done)
    spare = FAMILIES[family][1].get("spare", 0)
    assert done.rows_after - done.rows_before == max(0, len(NEW) - spare)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_padding_rows_beyond_the_markers_stay(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "llama-padded")
    done = init_model(source, tmp_path / "dst")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("src", "dst"))
    last = max(done.token_ids.values())
    assert last < done.rows_after == done.rows_before
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(old[name][last + 1 :], new[name][last + 1 :])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "dst")]
    assert configs[0] | {DELIMITERS_KEY: False} == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    source = build(tmp_path / "src", "llama-untied", dtype=dtype, shard="6KB")
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 2
    done = init_model(source, tmp_path / "dst")
    checked(source, tmp_path / "dst", done)
    assert sorted(file.name for file in (tmp_path / "dst").glob("*.safetensors")) == shards
    old, new = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("src", "dst")
    )
    assert new["weight_map"] == old["weight_map"]
    added = 2 * len(NEW) * SHAPE["hidden_size"] * 2
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + added
    same = [
        name
        for name in shards
        if (source / name).read_bytes() == (tmp_path / "dst" / name).read_bytes()
    ]
    assert len(shards) - len(same) == 2  # those of the two matrices


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_checkpoint_with_other_names(zipped: bool, tmp_path: Path) -> None:
    """As the first GPT-2 files: pickled, tied weight stored twice, names without the prefix."""
    source = build(tmp_path / "src", "gpt2-tied")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state["lm_head.weight"] = state["wte.weight"]
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    done = init_model(source, tmp_path / "dst")
    checked(source, tmp_path / "dst", done)
    assert not list((tmp_path / "dst").glob("*.bin"))


def test_tied_model_that_stores_both(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    done = init_model(source, tmp_path / "dst")
    checked(source, tmp_path / "dst", done)
    new = load_file(tmp_path / "dst/model.safetensors")
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])


def served(folder: Path) -> dict[str, Any]:
    """What a server with default options settles for this folder."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settled = MementoConfig(enable=True, constrain="strict").for_family(
        config["architectures"], config.get(DELIMITERS_KEY)
    )
    settled, markers = settle_sections(settled, None, tokenizer, config["vocab_size"])
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert markers.im_end in (ends if isinstance(ends, list) else [ends])
    return settled.model_dump(exclude_defaults=True)


def test_a_class_that_reads_otherwise_is_not_named(tmp_path: Path) -> None:
    """Llama's class has rules of its own for cutting text, and here no piece for a space."""
    source = build(tmp_path / "src", "llama-padded")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast", "chat_template": "old"})
    )
    note, _ = init_model(source, tmp_path / "a").notes
    assert "otherwise by the class LlamaTokenizerFast" in note
    text = "a block<think> start\n"
    ids = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json")).encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "a").encode(text) == ids
    before = build_tokenizer().encode("a block start")
    assert AutoTokenizer.from_pretrained(tmp_path / "a").encode("a block start") == before


def test_a_model_type_whose_class_transformers_takes_in_any_case(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "llama-padded")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    with pytest.raises(DataError, match=r"does not read tokenizer\.json as it is"):
        init_model(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied")
    damaged = json.loads((source / "tokenizer.json").read_text())
    damaged["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    (source / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match='comes back as "Theblockstartshere'):
        init_model(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_what_is_missing_is_added_and_every_family_is_served(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "llama-untied")
    plain = (source / "tokenizer.json").read_text()
    for name in ("<|im_start|>", "<|im_end|>"):
        plain = plain.replace(name, name.replace("im", "x"))
    (source / "tokenizer.json").write_text(plain)
    done = init_model(source, tmp_path / "a")
    assert list(done.token_ids) == [*NEW, "<|im_start|>", "<|im_end|>"]
    assert served(tmp_path / "a") == {
        "enable": True,
        "constrain": "strict",
        "mask_delimiters": False,
    }
    assert "stay visible" in done.notes[-1]
    init_model(source, tmp_path / "b", mask_delimiters=True)
    assert served(tmp_path / "b")["mask_delimiters"] is True
    qwen = init_model(build(tmp_path / "qwen", "qwen3-tied"), tmp_path / "c")
    assert qwen.notes == ()
    assert DELIMITERS_KEY not in (tmp_path / "c/config.json").read_text()
    assert served(tmp_path / "c")["mask_delimiters"] is False


def test_a_template_of_the_model_is_kept_and_must_be_told_by_tokens(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied")
    own = template("memento").replace("<|im_start|>", "<|x|>").replace("<|im_end|>", "<|eos|>")
    (source / "chat_template.jinja").write_text(own)
    with pytest.raises(MarkerError, match="cannot be learned from the chat template"):
        init_model(source, tmp_path / "dst", template=str(source))
    (source / "chat_template.jinja").write_text(own.replace("<|x|>", "<|im_start|>"))
    init_model(source, tmp_path / "dst", template=str(source))
    assert served(tmp_path / "dst")["im_end_token"] == "<|eos|>"


def test_same_seed_same_rows(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "llama-untied")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        init_model(source, tmp_path / name, seed=seed)
    init_model(source, tmp_path / "plain", noise=0.0)
    a, b, c, plain = (
        load_file(tmp_path / n / "model.safetensors") for n in ("a", "b", "c", "plain")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [name for name in a if not torch.equal(a[name], c[name])] != []
    noise = torch.cat(
        [
            (a[name] - plain[name])[-len(NEW) :].flatten()
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        ]
    )
    assert 0.007 < noise.std() < 0.013
    assert abs(noise.mean()) < 0.004
    assert not torch.equal(
        *((a[n] - plain[n])[-len(NEW) :] for n in ("lm_head.weight", "model.embed_tokens.weight"))
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ((*MARKERS, "<think>", "</think>"), "already"),
        (MARKERS[:2], r"has <\|block_start\|>, <\|block_end\|> but not"),
    ],
)
def test_refuses_what_has_the_tokens(extra: tuple[str, ...], said: str, tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied", extra=extra)
    with pytest.raises(ConfigError, match=said):
        init_model(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine.txt").write_text("mine")
    for target in (tmp_path / "dst", source, source / "config.json"):
        with pytest.raises(ConfigError, match="not empty"):
            init_model(source, target)
    assert [file.name for file in (tmp_path / "dst").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    checked(source, tmp_path / "empty", init_model(source, tmp_path / "empty"))


def test_damaged_weights_leave_nothing_behind(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "llama-untied", shard="6KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for broken, said in ((whole[:-1], "cut off"), (b"no", "not a safetensors"), (None, "lacks")):
        if broken is None:
            shard.unlink()
        else:
            shard.write_bytes(broken)
        with pytest.raises(DataError, match=said):
            init_model(source, tmp_path / "dst")
    shard.write_bytes(whole)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(DataError, match="holds no weights"):
        init_model(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_quantised_embeddings_are_refused(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied")
    state = load_file(source / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].to(torch.int8)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="quantised"):
        init_model(source, tmp_path / "dst")


def test_weights_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor library reads the files, and reads stay small whatever the file's size."""
    source = build(tmp_path / "src", "llama-untied", shard="6KB")

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("loads weights")

    monkeypatch.setattr("safetensors.torch.load_file", refused)
    monkeypatch.setattr("safetensors.safe_open", refused)
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr("memento_pipeline.checkpoint.weights._BUFFER", 64)
    init_model(source, tmp_path / "dst")
    monkeypatch.undo()
    assert loaded(tmp_path / "dst").config.vocab_size == loaded(source).config.vocab_size + len(NEW)


def test_rewrite_replaces_and_appends(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.int64).reshape(4, 3),
        "empty": torch.zeros(0, 3),
        "z": torch.arange(5, dtype=torch.float32),
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "note": "kept"})
    row = torch.tensor([7, 8, 9]).numpy().tobytes()
    one = torch.tensor([0.5]).numpy().tobytes()
    changes = {"a": {1: row, 3: row, 4: row}, "z": {5: one, 0: one}}
    rewrite(tmp_path / "in.safetensors", tmp_path / "out.safetensors", changes)
    out = load_file(tmp_path / "out.safetensors")
    assert out["a"].tolist() == [[0, 1, 2], [7, 8, 9], [6, 7, 8], [7, 8, 9], [7, 8, 9]]
    assert out["z"].tolist() == [0.5, 1, 2, 3, 4, 0.5]
    assert out["empty"].shape == (0, 3)
    assert read_header(tmp_path / "out.safetensors").metadata == {"format": "pt", "note": "kept"}


def test_command(tmp_path: Path) -> None:
    source = build(tmp_path / "src", "qwen3-tied")
    arguments = ["init-model", str(source), str(tmp_path / "dst"), "--chat-template", "memento"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "mean of block,  , start" in done.output
    assert AutoTokenizer.from_pretrained(tmp_path / "dst").chat_template == template("memento")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "not empty" in again.output
    wrong = CliRunner().invoke(app, ["init-model", str(tmp_path), str(tmp_path / "x")])
    assert wrong.exit_code == 2
    assert "config.json" in wrong.output
    unknown = [*arguments[:2], str(tmp_path / "x"), "--chat-template", "nope"]
    assert CliRunner().invoke(app, unknown).exit_code == 2
