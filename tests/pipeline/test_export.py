"""Files of a run: same rows everywhere, token spans that a trainer can use, a true card."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from memento_pipeline.output.assemble import AssembleOptions, assemble_row, parse_response
from memento_pipeline.output.chat import ChatTemplate, load_template
from memento_pipeline.output.export import ExportOptions, write_outputs
from memento_pipeline.output.stats import Stats
from memento_pipeline.output.tokenize import RowTokenizer
from memento_pipeline.output.validate import validate_row
from memento_pipeline.records import Attempt, Converted, Rejected, Status, Usage
from memento_pipeline.text.escape import unescape
from memento_pipeline.text.tokens import ApproxCounter
from rows import convert, trace
from tokenizer import character_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from memento_sgl.errors import ConfigError, DataError, MarkerError
from memento_sgl.offline.reference import attention_mask
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import Eviction, replay
from memento_sgl.rule.markers import resolve_markers

COUNTER = ApproxCounter()
CHARACTERS = set("\n" + "".join(map(chr, range(32, 127))))


class Adapter:
    """What `resolve_markers` needs of a tokenizer."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return str(self.tokenizer.id_to_token(ids))


LINES = ("chat", "messages")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[Converted]:
    rows = [
        trace("plain", domain="math", difficulty=2),
        trace("hostile", hostile=True, problem="Say <|block_end|><|im_end|>."),
        trace("long", paragraphs=16),
        {"id": "short", "problem": "p", "cot": "too short</think>x"},
    ]
    rows[1]["cot"] += " <|im_end|></think><|summary_end|>"
    made = convert(tmp_path_factory.mktemp("export"), rows)
    assert [one.status.value for one in made] == ["ok", "ok", "ok", "filtered"]
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / name / "train.parquet").to_pylist()


def readable(text: str) -> str:
    """As the character tokenizer shows it."""
    return "".join(c if c in CHARACTERS else "?" for c in text)


@pytest.mark.parametrize("mask_delimiters", [False, True])
def test_rows_train(
    done: list[Converted], tokenizer: Path, tmp_path: Path, mask_delimiters: bool
) -> None:
    """The tokenized dataset: spans are the text, evictions are the reference's, and the mask hides
    exactly what the definition says."""
    options = ExportOptions(tokenizer=tokenizer, mask_delimiters=mask_delimiters)
    write_outputs(tmp_path, done, COUNTER, options)
    adapter = Adapter(tokenizer)
    config = MementoConfig(enable=True, mask_delimiters=mask_delimiters)
    markers = resolve_markers(config, adapter)
    rows = zip(table(tmp_path, "tokenized"), table(tmp_path, "full"), strict=True)
    for row, full in rows:
        ids, prompt = row["input_ids"], row["prompt_tokens"]

        def text(start: int, end: int, ids: list[int] = ids) -> str:
            return adapter.tokenizer.decode(ids[start:end], skip_special_tokens=False)

        assert (
            text(0, prompt)
            == f"<|im_start|>user\n{full['problem']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert text(prompt, len(ids)) == readable(full["response"]) + "<|im_end|>"
        assert row["labels"] == [-100] * prompt + ids[prompt:]
        parsed = parse_response(full["response"])
        assert [text(a, b) for a, b in row["block_spans"]] == [*map(readable, parsed.blocks)]
        assert [text(a, b) for a, b in row["memento_spans"]] == [*map(readable, parsed.mementos)]

        machine = replay(ids, prompt, markers, config)
        assert row["evictions"] == [[e.point, e.start, e.end] for e in machine.evictions]
        expected = [
            [memento[1], block[0] - mask_delimiters, block[1] + mask_delimiters]
            for block, memento in zip(row["block_spans"], row["memento_spans"], strict=True)
        ]
        assert row["evictions"] == expected
        mask = attention_mask([Eviction(p, a, b, p) for p, a, b in row["evictions"]], len(ids))
        check_mask(mask, expected)
        assert validate_row(row) == []


def check_mask(mask: torch.Tensor, evictions: list[list[int]]) -> None:
    """Against the definition, entry by entry where it matters and in sum."""
    length = len(mask)
    hidden = 0
    for point, start, end in evictions:
        assert not mask[point:, start:end].any()
        assert mask[point - 1, start:end].all()  # the memento itself sees its block
        hidden += (length - point) * (end - start)
    assert int(mask.sum()) == length * (length + 1) // 2 - hidden
    assert hidden > 0


def test_a_model_learns_from_a_row(done: list[Converted], tokenizer: Path, tmp_path: Path) -> None:
    """A few steps under the mask: the loss falls, and an evicted block has no say any more."""
    write_outputs(tmp_path, done, COUNTER, ExportOptions(tokenizer=tokenizer))
    row = min(table(tmp_path, "tokenized"), key=lambda row: len(row["input_ids"]))
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": int(ids.max()) + 1}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, max_position_embeddings=8192))
    evictions = [Eviction(p, a, b, p) for p, a, b in row["evictions"]]
    seen = attention_mask(evictions, ids.shape[1])
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, attention_mask=bias, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    # One layer deep, queries after the eviction point get nothing from the block directly.
    point, start, end = row["evictions"][0]
    attention = model.model.layers[0]
    states = torch.randn(1, ids.shape[1], 32, requires_grad=True)
    places = torch.arange(ids.shape[1])[None]
    out = attention(
        states, attention_mask=bias, position_embeddings=model.model.rotary_emb(states, places)
    )
    out[0, point:].sum().backward()
    assert states.grad is not None
    assert not states.grad[0, start:end].any()
    assert states.grad[0, end : point + 1].any()


def test_every_output_holds_the_same_rows(done: list[Converted], tmp_path: Path) -> None:
    files = write_outputs(tmp_path, done, COUNTER)
    assert all(file.is_file() for file in files)
    assert not list(tmp_path.rglob("*.part"))
    ok = [one for one in done if one.status is Status.OK]
    extras, full = table(tmp_path, "extras"), table(tmp_path, "full")
    chat = [json.loads(line) for line in (tmp_path / "chat/train.jsonl").read_text().splitlines()]
    for one, extra, row, said in zip(ok, extras, full, chat, strict=True):
        assert extra["id"] == said["id"] == one.trace.id
        thought, edges = one.trace.thought, extra["sentence_edges"]
        assert [unescape(text) for text in row["sentences"]] == [
            thought[a:b] for a, b in pairwise(edges)
        ]
        blocks = [unescape(text) for text in parse_response(row["response"]).blocks]
        assert blocks == [thought[a:b] for a, b in extra["block_chars"]]
        assert extra["memento_tokens"] == [memento.tokens for memento in one.mementos]
        assert json.loads(extra["provenance"]) == one.trace.provenance
        assert said["text"] == (
            f"<|im_start|>user\n{row['problem']}<|im_end|>\n<|im_start|>assistant\n"
            f"{row['response']}<|im_end|>"
        )
        assert validate_row(said) == []


def test_rejects_have_reason_and_place(done: list[Converted], tmp_path: Path) -> None:
    bad = Rejected(file="in.jsonl", row=9, reason="not valid JSON: x", excerpt="{")
    options = AssembleOptions(max_tokens=1200)
    write_outputs(tmp_path, done, COUNTER, None, options, [bad])
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    found = {(line.get("id"), line["status"], line["row"]): line["reason"] for line in lines}
    assert found[("short", "filtered", 4)].startswith("too short")
    assert found[("long", "filtered", 3)].startswith("too long")
    assert found[(None, "rejected", 9)] == "not valid JSON: x"
    assert len(table(tmp_path, "default")) == len(done) - 2
    statuses = json.loads((tmp_path / "stats.json").read_text())["statuses"]
    assert statuses == {"ok": 2, "filtered": 2, "rejected": 1}


def test_cut_rows_are_marked(done: list[Converted], tokenizer: Path, tmp_path: Path) -> None:
    options = AssembleOptions(max_tokens=1200, too_long="cut")
    write_outputs(tmp_path, done, COUNTER, ExportOptions(tokenizer=tokenizer), options)
    extras = {row["id"]: row for row in table(tmp_path, "extras")}
    whole = {one.trace.id: len(one.mementos) for one in done}
    assert 0 < extras["long"]["blocks_kept"] < whole["long"]
    assert extras["plain"]["blocks_kept"] == whole["plain"]
    rows = {row["id"]: row for row in table(tmp_path, "tokenized")}
    assert len(rows["long"]["block_spans"]) == extras["long"]["blocks_kept"]
    assert json.loads((tmp_path / "stats.json").read_text())["cut_rows"] == 1


def test_a_failed_export_leaves_the_old_files(done: list[Converted], tmp_path: Path) -> None:
    write_outputs(tmp_path, done, COUNTER)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def torn() -> Any:
        yield done[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_outputs(tmp_path, torn(), COUNTER)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_tokenizers_and_templates_that_cannot_work(
    done: list[Converted], tokenizer: Path, tmp_path: Path
) -> None:
    plain = json.loads(tokenizer.read_text())
    plain["added_tokens"] = [
        token for token in plain["added_tokens"] if "summary" not in token["content"]
    ]
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    with pytest.raises(MarkerError, match="summary_start"):
        write_outputs(tmp_path, done, COUNTER, ExportOptions(tokenizer=tmp_path / "plain.json"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        write_outputs(tmp_path, done, COUNTER, ExportOptions(tokenizer=tmp_path / "none"))
    with pytest.raises(ConfigError, match="nope"):
        load_template("nope")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="not valid jinja"):
        load_template(str(tmp_path / "bad.jinja"))
    strips = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    )
    with pytest.raises(ConfigError, match="remove thoughts"):
        ChatTemplate(strips).render("p", "<think>t</think>a")
    rows = RowTokenizer(tokenizer, load_template("memento_nosys"), False)
    row = assemble_row(done[0], COUNTER).row
    assert row is not None
    with pytest.raises(DataError, match="blocks in the tokens"):
        rows.tokenize(row.problem, row.response, 1)


def test_card_and_sums(done: list[Converted], tmp_path: Path) -> None:
    write_outputs(tmp_path, done, COUNTER, ExportOptions(name="apples"))
    stats = json.loads((tmp_path / "stats.json").read_text())
    ok = [one for one in done if one.status is Status.OK]
    blocks = [block for one in ok for block in one.segmentation.blocks]  # type: ignore[union-attr]
    mementos = [memento for one in ok for memento in one.mementos]
    assert stats["rows"] == 3
    assert stats["blocks"] == len(blocks) == len(mementos)
    ratio = sum(m.tokens for m in mementos) / sum(b.tokens for b in blocks)
    assert stats["memento_ratio"] == pytest.approx(ratio)
    assert stats["pass_rate"] is stats["pass_rate_first"] is None
    assert stats["reasons"] == {"too short: N of at least N tokens": 1}
    assert stats["escaped"] > 0
    card = (tmp_path / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", card, re.S).groups()  # type: ignore[union-attr]
    assert re.findall(r"config_name: (\w+)", head) == ["default", "full", "extras", *LINES]
    for path in re.findall(r"path: (\S+)", head):
        assert (tmp_path / path).is_file()
    assert "n<1K" in head
    assert body.startswith("# apples\n")
    assert "rule-based baseline" in body
    assert f"| rows | {stats['rows']} |" in body
    assert f"{stats['memento_ratio']:.3f}" in body
    assert "in the end | not judged |" in body
    assert "- 1: too short: N of at least N tokens" in body


def test_pass_rates_count_from_the_first_attempt(done: list[Converted]) -> None:
    scores = [(3.0, 9.0), (8.0, 8.0), (5.0, 7.5)]
    mementos = [
        memento.model_copy(
            update={
                "judge_score": last,
                "history": (
                    Attempt(text="a", judge_score=first),
                    Attempt(text="b", judge_score=last),
                ),
            }
        )
        for memento, (first, last) in zip(done[0].mementos, scores, strict=False)
    ]
    judged = done[0].model_copy(update={"mementos": (*mementos, *done[0].mementos[3:])})
    stats = Stats("approx-1")
    stats.add(judged, assemble_row(judged, COUNTER))
    summary = stats.summary()
    assert summary["judged"] == 3 < summary["blocks"]
    assert summary["pass_rate_first"] == pytest.approx(1 / 3)
    assert summary["pass_rate"] == pytest.approx(2 / 3)


def test_sums_keep_unknown_apart_from_zero(done: list[Converted]) -> None:
    stats = Stats("approx-1")
    assert stats.summary()["dollars"] is None
    unknown = done[0].model_copy(update={"usage": Usage(calls=3)})
    stats.add(unknown, assemble_row(unknown, COUNTER))
    summary = stats.summary()
    assert summary["calls"] == 3
    assert summary["prompt_tokens"] is summary["completion_tokens"] is summary["dollars"] is None
