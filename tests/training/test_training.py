"""`memento train` on a tiny model: the mask it trains under, packing, resuming, refusals."""

from __future__ import annotations

import json
import random
import shutil
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.demo.task import Problem
from memento_sgl.errors import ConfigError, DataError, StoreError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import Eviction, replay
from memento_sgl.rule.markers import resolve_markers
from memento_sgl.training.rows import TrainingRow, pack_rows, read_training_rows

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the demo's tokens."""
    from memento_sgl.demo.tokenizer import build_tokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(model: Path, count: int) -> list[TrainingRow]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    markers = resolve_markers(CONFIG, tokenizer)
    rng = random.Random(1)
    rows = []
    for _ in range(count):
        groups = ["".join(rng.choices(string.digits, k=2)) for _ in range(rng.randint(2, 3))]
        problem = Problem(tuple(groups))
        prompt = tokenizer.encode(problem.question, add_special_tokens=False)
        output = tokenizer.encode(problem.output + "<|im_end|>", add_special_tokens=False)
        machine = replay(prompt + output, len(prompt), markers, CONFIG)
        rows.append(
            TrainingRow(
                input_ids=prompt + output,
                labels=[-100] * len(prompt) + output,
                evictions=[[e.point, e.start, e.end] for e in machine.evictions],
                block_spans=[[b.start + 1, b.end] for b in machine.blocks],
                memento_spans=[[b.summary_start + 1, b.summary_end] for b in machine.blocks],
            )
        )
    return rows


@pytest.fixture(scope="module")
def rows(model: Path) -> list[TrainingRow]:
    return make_rows(model, 24)


def write_rows(path: Path, rows: list[TrainingRow]) -> Path:
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows]), path)
    return path


def settings(model: Path, **changes: Any) -> Any:
    from memento_sgl.training.stages import TrainSettings

    base = TrainSettings(
        model=str(model),
        epochs=1,
        learning_rate=1e-2,
        batch_size=2,
        pack_tokens=256,
        held_out=3,
        logging_steps=1,
        save_steps=2,
    )
    return replace(base, **changes)


def loss_of(model: Any, rows: list[TrainingRow], *, masked: bool) -> float:
    """Mean loss over learned tokens, each row alone under the reference mask."""
    from memento_sgl.offline.reference import masked_logits

    total = count = 0.0
    for row in rows:
        evictions = [Eviction(p, s, e, p) for p, s, e in row.evictions] if masked else []
        logits = masked_logits(model, row.input_ids, evictions)[:-1].log_softmax(-1)
        for index, label in enumerate(row.labels[1:]):
            if label != -100:
                total -= float(logits[index, label])
                count += 1
    return total / count


@pytest.mark.parametrize("stage", ["full", "memento"])
def test_the_loss_of_a_step_is_that_of_the_reference_mask(
    model: Path, rows: list[TrainingRow], stage: Any, tmp_path: Path
) -> None:
    """Packed rows see what each sees alone, under the stage's mask and no other."""
    from memento_sgl.training.stages import Training

    training = Training(
        rows, tmp_path, settings(model, stages=(stage,), batch_size=100, learning_rate=0.0)
    )
    assert max(len(p.input_ids) for p in pack_rows(training.rows, stage, 256)) > 150
    training.run()
    last = max((tmp_path / f"1-{stage}" / "checkpoints").glob("*/trainer_state.json"))
    logged = json.loads(last.read_text())["log_history"][0]
    untrained = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = loss_of(untrained.eval(), training.rows, masked=stage == "memento")
    other = loss_of(untrained, training.rows, masked=stage != "memento")
    assert abs(expected - other) > 1e-4  # the two masks can be told apart
    assert abs(logged["loss"] - expected) < 2e-5, (logged["loss"], expected, other)
    assert logged["tokens_per_second"] > 0


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Ends training behind so many optimizer steps, as a kill would."""
    from memento_sgl.training.trainer import MementoTrainer

    left = {"steps": 10**9}
    before = MementoTrainer.log

    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        left["steps"] -= 1
        if left["steps"] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(MementoTrainer, "log", log)
    return left


def weights(folder: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def test_two_stages_learn_and_go_on_where_they_were_ended(
    model: Path, rows: list[TrainingRow], tmp_path: Path, crash: dict[str, int]
) -> None:
    from memento_sgl.training.stages import Training

    chosen = settings(model, epochs=3, in_order=True)
    found = Training(rows, tmp_path / "whole", chosen).run()
    assert list(found) == ["1-full", "2-memento"]
    before = loss_of(
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
        rows[:4],
        masked=True,
    )
    for measured in found.values():
        assert measured is not None
        assert measured.rows == 3
        assert measured.loss < before - 0.5
        assert 0 <= measured.marker_accuracy <= 1
    crash["steps"] = 5
    with pytest.raises(KeyboardInterrupt):
        Training(rows, tmp_path / "parts", chosen).run()
    assert not (tmp_path / "parts" / "1-full" / "done.json").exists()
    assert Training(rows, tmp_path / "parts", chosen).run() == found
    whole, parts = (weights(tmp_path / name / "2-memento") for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)
    with pytest.raises(StoreError, match="learning_rate"):
        Training(rows, tmp_path / "parts", replace(chosen, learning_rate=1.0)).run()


def test_lora_trains_the_marker_rows_too(
    model: Path, rows: list[TrainingRow], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from memento_sgl.training.stages import Training

    training = Training(rows, tmp_path, settings(model, stages=("memento",), lora=4))
    training.run()
    before, after = weights(model), weights(tmp_path / "1-memento")
    changed = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    markers = resolve_markers(CONFIG, tokenizer)
    tags = {markers.think_start, markers.think_end}
    assert set(changed.nonzero().flatten().tolist()) == {*markers[:4], *tags}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not before[name].equal(after[name])


def test_measured_mementos_are_those_of_the_reference(model: Path, rows: list[TrainingRow]) -> None:
    """What the cached continuation writes is what full recomputation under the mask writes."""
    from memento_sgl.offline.reference import masked_logits
    from memento_sgl.training.measure import _write_memento

    one = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    row = max(rows, key=lambda row: len(row.memento_spans))
    begin, end = row.memento_spans[-1]
    evictions = [Eviction(p, s, e, p) for p, s, e in row.evictions if p < begin]
    assert evictions
    ids = row.input_ids[:begin]
    for _ in range(4 * (end - begin)):
        ids = [*ids, int(masked_logits(one, ids, evictions)[-1].argmax())]
    for closes in dict.fromkeys(ids[begin:]):  # whichever token comes: where it comes first
        with torch.no_grad():
            found = _write_memento(one, row, "memento", (begin, end), closes)
        assert found == (ids[begin:].index(closes), end - begin, True)


def test_a_loss_that_is_no_number_ends_the_run(
    model: Path, rows: list[TrainingRow], tmp_path: Path
) -> None:
    from memento_sgl.training.stages import Training

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    one = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        one.model.norm.weight[0] = float("nan")
    one.save_pretrained(broken)
    with pytest.raises(DataError, match="the loss is nan at step 1"):
        Training(rows, tmp_path / "out", settings(broken)).run()


def test_rows_that_cannot_be_trained_on(
    model: Path, rows: list[TrainingRow], tmp_path: Path
) -> None:
    from memento_sgl.training.rows import check_tokens

    whole = rows[0]
    for row, message in (
        (whole._replace(block_spans=[]), "row 0: no blocks"),
        (whole._replace(labels=whole.labels[1:]), "labels for"),
        (whole._replace(labels=[-100] * len(whole.labels)), "nothing to learn"),
        (whole._replace(evictions=[[1, 5, 2]]), "is no eviction"),
    ):
        path = write_rows(tmp_path / "rows.parquet", [row])
        with pytest.raises(DataError, match=message):
            read_training_rows([path])
    assert read_training_rows([write_rows(tmp_path / "rows.parquet", rows)]) == rows
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="has no column input_ids"):
        read_training_rows([tmp_path / "text.parquet"])
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"bad\.parquet is no Parquet"):
        read_training_rows([tmp_path / "bad.parquet"])
    with pytest.raises(ConfigError, match="no such file"):
        read_training_rows([tmp_path / "none"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    markers = resolve_markers(CONFIG, tokenizer)[:4]
    check_tokens(rows, len(tokenizer), markers)
    with pytest.raises(DataError, match="another model"):
        check_tokens(rows, 20, markers)
    with pytest.raises(DataError, match="another model"):
        check_tokens(rows, len(tokenizer), [markers[1], markers[0], *markers[2:]])
    with pytest.raises(DataError, match="raise --pack-tokens"):
        pack_rows(rows, "full", 50)


def test_the_command(model: Path, rows: list[TrainingRow], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", rows)
    command = [
        "train", str(model), str(data), "--out", str(tmp_path / "out"), "--stages", "memento",
        "--batch-size", "2", "--pack-tokens", "256", "--held-out", "2", "--epochs", "1",
    ]  # fmt: skip
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "AdamW states" in dry.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "1-memento" in result.output
    assert (tmp_path / "out" / "1-memento" / "model.safetensors").exists()
    refused = CliRunner().invoke(app, [*command, "--learning-rate", "1e-3"])
    assert refused.exit_code == 6, refused.output
    refused = CliRunner().invoke(app, ["train", "./none", str(data), "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "no model folder" in refused.output


@pytest.mark.external
def test_two_processes(model: Path, rows: list[TrainingRow], tmp_path: Path) -> None:
    """The same run on two CPU processes gives the same model as on one, sums in another order."""
    data = write_rows(tmp_path / "rows.parquet", rows)
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu",
            "--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no",
            "-m", "memento_sgl.cli.app", "train", str(model), str(data), "--out", str(out),
            "--stages", "memento", "--batch-size", "4", "--pack-tokens", "256", "--epochs", "1",
            "--held-out", "4", "--in-order",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(weights(out / "1-memento"))
    for name, one in found[0].items():
        assert (one - found[1][name]).abs().max() < 1e-5, name
