"""`memento simulate`: figures of the one accounting, from every kind of file."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import held_out
from memento_sgl.errors import ConfigError
from memento_sgl.offline.inputs.formats import traces_of
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.offline.simulate.model_shape import SHAPES, load_shape
from memento_sgl.offline.simulate.replay import Replayer, simulate
from memento_sgl.rule.accounting import account, kv_curve
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import replay

PROBLEMS = held_out(4, sizes=[3, 6])
ROWS = [
    {"id": f"p{i}", "problem": p.question, "response": p.output} for i, p in enumerate(PROBLEMS)
]
CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{output}<|im_end|>"


@pytest.fixture(scope="module")
def replayer() -> Replayer:
    return Replayer(TextTokenizer(MODEL_DIR), MementoConfig(enable=True, mask_delimiters=False))


def run(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> str:
    done = CliRunner().invoke(app, ["simulate", *map(str, arguments)], input=stdin)
    assert done.exit_code == code, done.output
    return done.output


def json_lines(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> list[Any]:
    output = run(*arguments, "--json", code=code, stdin=stdin)
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize("keep_last", [0, 1, 2, -1])
def test_figures_follow_the_definition(replayer: Replayer, keep_last: int) -> None:
    (trace,) = traces_of(ROWS[1], "t")
    tokens = replayer.tokens(trace)
    result = simulate(replayer, tokens, keep_last)
    config = MementoConfig(enable=True, mask_delimiters=False, keep_last_n_blocks=keep_last)
    machine = replay(tokens.ids, tokens.prompt_len, replayer.markers, config)
    length = len(tokens.ids)
    assert result.accounting == account(machine, tokens.prompt_len, length)
    held = kv_curve(machine.evictions, length - 1)
    output = held[tokens.prompt_len - 1 :]
    assert result.steps == len(output) == length - tokens.prompt_len
    assert result.average_kv_tokens == pytest.approx(sum(output) / len(output))
    assert len(result.lines) == 6
    evicted = [line for line in result.lines if line.eviction is not None]
    assert len(evicted) == (6 - keep_last if keep_last >= 0 else 0)
    for line in evicted:
        assert line.eviction is not None
        assert line.kv_before == held[line.eviction.point - 1]
        assert line.kv_after == held[line.eviction.point]
        assert line.compression == line.block.summary_tokens / line.block.block_tokens


def test_a_row_becomes_the_prompt_that_the_server_sees(replayer: Replayer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    (trace,) = traces_of(ROWS[0], "t")
    tokens = replayer.tokens(trace)
    text = tokenizer.apply_chat_template(
        PROBLEMS[0].messages, add_generation_prompt=True, tokenize=False
    )
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert tokens.ids[: tokens.prompt_len] == expected
    rest = tokenizer.encode(PROBLEMS[0].output, add_special_tokens=False)
    assert tokens.ids[tokens.prompt_len :] == [*rest, tokenizer.eos_token_id]


def test_every_kind_of_file_gives_the_same(replayer: Replayer, tmp_path: Path) -> None:
    chat = [CHAT.format(question=p.question, output=p.output) for p in PROBLEMS]
    ids = [replayer.tokens(traces_of(row, "t")[0]).ids for row in ROWS]
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    pretty = json.dumps(ROWS, indent=2)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "more.json").write_text(lines)
    (tmp_path / "pretty.json").write_text(pretty)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    (tmp_path / "idlines.jsonl").write_text("".join(json.dumps(i) + "\n" for i in ids))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table.parquet")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(chat):
        (texts / f"{number}.txt").write_text(text)
    expected = json_lines(tmp_path / "lines.jsonl", "--keep-last-n-blocks", "0,1")[-1]
    assert expected["sums"][0]["requests"] == 4
    assert expected["sums"][0]["evicted_tokens"] > expected["sums"][1]["evicted_tokens"] > 0
    found = [path for path in tmp_path.iterdir() if path.name != "lines.jsonl"]
    assert len(found) == 7
    for path in found:
        assert json_lines(path, "--keep-last-n-blocks", "0,1")[-1] == expected, path.name
    for text in (lines, pretty):
        assert json_lines("-", "--keep-last-n-blocks", "0,1", stdin=text)[-1] == expected
    (one,) = json_lines("-", stdin=chat[0])[:-1]
    assert one["request"] == "stdin:1"
    assert one["runs"][0]["blocks"] == 3


def test_work_folders_and_file_pairs_are_read_once(tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    row = {"id": "a", "problem": "Solve it.", "cot": "This is one sentence. " * 60 + "</think>"}
    traces.write_text(json.dumps(row | {"answer": "Done."}) + "\n")
    done = CliRunner().invoke(
        app, ["convert", str(traces), "--out", str(tmp_path / "work"), "--quiet"]
    )
    assert done.exit_code == 0, done.output
    sums = json_lines(tmp_path / "work")[-1]["sums"][0]
    assert (sums["requests"], sums["blocks"] > 0) == (1, True)


def test_text_without_chat_markup_is_all_output(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(PROBLEMS[0].output)
    (row, _) = json_lines(tmp_path / "plain.txt")
    assert (row["prompt_tokens"], row["runs"][0]["blocks"]) == (0, 3)
    assert row["runs"][0]["steps"] == row["tokens"] - 1


def test_only_the_last_assistant_turn_is_output(tmp_path: Path) -> None:
    first, second = (CHAT.format(question=p.question, output=p.output) for p in PROBLEMS[:2])
    (tmp_path / "chat.txt").write_text(f"{first}\n{second}")
    (row, _) = json_lines(tmp_path / "chat.txt")
    assert row["tokens"] - row["prompt_tokens"] == row["runs"][0]["steps"]
    assert row["runs"][0]["blocks"] == 9
    size = Replayer(TextTokenizer(MODEL_DIR), MementoConfig(enable=True, mask_delimiters=False))
    assert row["runs"][0]["steps"] == len(size.tokenizer.encode(PROBLEMS[1].output)) + 1


def test_bad_rows_are_counted_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = {
        "[1, 2": "not valid JSON",
        '"text"': "expected an object",
        '{"answer": 1}': "no known format",
        '{"response": ""}': "training row: response is missing",
        '{"input_ids": [1, 2], "prompt_tokens": 5}': "prompt_tokens=5 of 2",
        '{"input_ids": [1, "x"]}': "must be a list of token ids",
        '{"meta_info": {}, "text": "x"}': "/generate answer: KeyError",
        '{"format": "memento-rollout-9", "prompt_ids": [1], "output_ids": [1]}': "rollout record",
    }
    path.write_text("\n".join([json.dumps(ROWS[0]), *bad]))
    lines = json_lines(path, code=3)
    reasons = {line["row"]: line["reason"] for line in lines if "bad_row" in line}
    assert list(reasons) == list(range(2, 2 + len(bad)))
    for reason, expected in zip(reasons.values(), bad.values(), strict=True):
        assert expected in reason
    assert (lines[-1]["bad_rows"], lines[-1]["sums"][0]["requests"]) == (len(bad), 1)
    table = run(path, code=3)
    assert f"{path}:2" in table.replace("\n", "")
    path.write_text("")
    assert "no traces" in run(path, code=3)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-20])
    assert "cut off" in run(tmp_path / "cut.jsonl.gz", code=3)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 <|block_start|>")
    assert "not UTF-8" in run(tmp_path / "latin.txt", code=3)


def test_bytes_follow_the_papers_formula(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    model = ("--model", "qwen3-8b", "--tokenizer", str(MODEL_DIR))
    (row, sums) = json_lines(tmp_path / "rows.jsonl", *model)
    figures = row["runs"][0]
    assert figures["peak_kv_bytes"] == figures["peak_kv_tokens"] * 36 * 8 * 128 * 2 * 2
    assert sums["model"]["layers"] == 36
    assert "144.0 KiB per token" in run(tmp_path / "rows.jsonl", *model)
    half = json_lines(tmp_path / "rows.jsonl", *model, "--kv-dtype", "fp8")
    assert half[0]["runs"][0]["peak_kv_bytes"] == figures["peak_kv_bytes"] / 2
    embedded = load_shape(str(MODEL_DIR))
    assert (embedded.layers, embedded.kv_heads, embedded.head_size) == (3, 2, 32)
    assert embedded.element_bytes == 4
    assert load_shape("Phi-4-reasoning").kv_bytes(1) == 40 * 10 * 128 * 2 * 2
    assert set(SHAPES) >= {"qwen3-8b", "qwen3-32b", "phi-4-reasoning"}


def test_characters_are_never_shown_in_bytes(tmp_path: Path) -> None:
    """Without --tokenizer text is counted in characters, which is said; sizes that a file has are
    tokens of its model."""
    (tmp_path / "text.jsonl").write_text(json.dumps(ROWS[0]))
    model = ("--model", "qwen3-8b")
    (row, sums) = json_lines(tmp_path / "text.jsonl", *model)
    assert not [name for name in row["runs"][0] | sums["sums"][0] if "bytes" in name]
    assert sums["tokenizer"] == "model/tokenizer.json (one per character)"
    shown = run(tmp_path / "text.jsonl", *model)
    assert "iB" not in shown
    assert "No bytes: tokens of text are characters" in shown
    assert "one per character" in run(tmp_path / "text.jsonl")
    (tmp_path / "ids.jsonl").write_text(json.dumps({"prompt_ids": [5], "output_ids": [6] * 9}))
    (row, _) = json_lines(tmp_path / "ids.jsonl", *model)
    assert row["runs"][0]["peak_kv_bytes"] == 9 * 36 * 8 * 128 * 2 * 2
    own = json_lines(tmp_path / "text.jsonl", "--model", str(MODEL_DIR))
    assert own[0]["runs"][0]["peak_kv_bytes"] > 0
    assert own[-1]["tokenizer"] == "model/tokenizer.json"


@pytest.mark.parametrize("damage", [b"", b"PAR1 cut"])
def test_a_damaged_table_is_named_and_the_rest_is_read(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "b.parquet").write_bytes(damage)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    half = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(half[: len(half) // 2])
    lines = json_lines(tmp_path, code=3)
    bad = [(Path(line["bad_row"]).name, line["reason"]) for line in lines if "bad_row" in line]
    assert [name for name, _ in bad] == ["b.parquet", "d.parquet"]
    assert all(f"{name} cannot be read" in reason for name, reason in bad)
    assert lines[-1]["sums"][0]["requests"] == 5
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(app, ["view", str(tmp_path), "--out", str(page)])
    assert shown.exit_code == 3
    assert "b.parquet cannot be read" in shown.output.replace("\n", "")
    assert page.is_file()


def test_configs_that_do_not_tell_the_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_attention_heads": 8, "kv_lora_rank": 512}))
    with pytest.raises(ConfigError, match="latent or linear attention"):
        load_shape(str(path))
    path.write_text(json.dumps({"num_attention_heads": 8}))
    with pytest.raises(ConfigError, match="does not tell the KV size"):
        load_shape(str(path))
    with pytest.raises(ConfigError, match="known one"):
        load_shape("qwen9")
    nested = {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2}
    path.write_text(json.dumps({"text_config": nested, "torch_dtype": "float16"}))
    shape = load_shape(str(tmp_path))
    assert (shape.kv_heads, shape.head_size, shape.element_bytes) == (8, 8, 2)


def test_the_family_settles_the_delimiters(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))

    def evicted(*more: str) -> int:
        found: int = json_lines(tmp_path / "rows.jsonl", *more)[-1]["sums"][0]["evicted_tokens"]
        return found

    stay = evicted()
    assert evicted("--model", "qwen3-8b") == stay
    assert evicted("--model", "phi-4-reasoning") == stay + 2 * 3
    assert evicted("--mask-delimiters") == stay + 2 * 3
    assert evicted("--model", "phi-4-reasoning", "--no-mask-delimiters") == stay
    restart = json_lines(tmp_path / "rows.jsonl", "--memento-config", '{"restart_mode": true}')
    assert restart[-1]["sums"][0]["recomputed_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--keep-last-n-blocks", "0,x"], "give numbers with commas"),
        (["--keep-last-n-blocks", "-2"], "greater than or equal to -1"),
        (
            ["--keep-last-n-blocks", "1", "--memento-config", '{"restart_mode": true}'],
            "keep_last_n_blocks",
        ),
        (["--memento-config", '{"keep": 1}'], "unknown option"),
        (["--memento-config", '{"block_end_token": "nope"}'], "not exactly one token"),
        (["--kv-dtype", "fp8"], "needs --model"),
        (["--model", "qwen3-8b", "--kv-dtype", "int3"], "is not one of"),
        (["--tokenizer", "nowhere"], "no tokenizer at"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, arguments: list[str], reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    assert reason in run(tmp_path / "rows.jsonl", *arguments, code=2)
    assert "no such file" in run(tmp_path / "none.jsonl", code=2)
    (tmp_path / "x.bin").write_text("")
    assert "not one of the known kinds" in run(tmp_path / "x.bin", code=2)


def test_blocks_table(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    output = run(tmp_path / "rows.jsonl", "--blocks", "--keep-last-n-blocks", "1")
    assert "p0:" in output
    assert output.count("stays") == 1


def test_random_ids_of_any_shape(replayer: Replayer) -> None:
    """Malformed sequences, cut anywhere: never an error, and KV is never more than without."""
    rng = random.Random(3)
    markers = [token for token in replayer.markers if isinstance(token, int)]
    for _ in range(200):
        ids = rng.choices([*markers, 40, 41, 42], k=rng.randint(1, 60))
        tokens = replayer.tokens(traces_of(ids, "t")[0])
        result = simulate(replayer, tokens, rng.choice([0, 1, -1]))
        assert result.accounting.kv_auc <= result.accounting.kv_auc_without
        assert result.steps >= 0


def test_needs_neither_torch_nor_sglang(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    code = (
        "import sys; sys.modules.update(torch=None, sglang=None, transformers=None)\n"
        "from memento_sgl.cli.app import app\n"
        "app(sys.argv[1:])"
    )
    for arguments in (["simulate"], ["view", "--out", str(tmp_path / "page.html")]):
        command = [sys.executable, "-c", code, *arguments, str(tmp_path / "rows.jsonl")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
