"""Outputs of a run: OpenMementos rows, extras, chat text, token ids, rejects and a card.

    FOLDER/default/train.{jsonl,parquet}     problem, response, domain, source, difficulty
    FOLDER/full/train.{jsonl,parquet}        + sentences, blocks, block_summaries
    FOLDER/extras/train.{jsonl,parquet}      one row per row above, same order: ids, offsets, scores
    FOLDER/chat/train.{jsonl,parquet}        id, text: what a trainer tokenizes
    FOLDER/messages/train.{jsonl,parquet}    id, messages: for trainers that apply a template
    FOLDER/tokenized/train.parquet           with a tokenizer: see `tokenize`
    FOLDER/rejected.jsonl                    traces without a row, with the reason
    FOLDER/stats.json, FOLDER/README.md      sums, dataset card

One pass over the traces, one batch in memory; every file is replaced as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from memento_pipeline.output.assemble import Assembled, AssembleOptions, assemble_row
from memento_pipeline.output.card import render_card
from memento_pipeline.output.chat import ChatTemplate, load_template
from memento_pipeline.output.sinks import JsonlSink, ParquetSink, Sink, write_whole
from memento_pipeline.output.stats import Stats
from memento_pipeline.output.tokenize import TOKENIZED_SCHEMA, RowTokenizer
from memento_pipeline.records import Converted, Record, Rejected, Status
from memento_pipeline.text.tokens import TokenCounter

_DEFAULT = pa.schema(
    [
        pa.field("problem", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        ("domain", pa.string()),
        ("source", pa.string()),
        ("difficulty", pa.int64()),
    ]
)
_FULL = pa.schema(
    [
        *_DEFAULT,
        ("sentences", pa.list_(pa.string())),
        ("blocks", pa.list_(pa.list_(pa.int64()))),
        ("block_summaries", pa.list_(pa.string())),
    ]
)
_EXTRAS = pa.schema(
    [
        ("id", pa.string()),
        ("tokenizer", pa.string()),
        ("sentence_edges", pa.list_(pa.int64())),
        ("block_chars", pa.list_(pa.list_(pa.int64()))),
        ("block_tokens", pa.list_(pa.int64())),
        ("memento_tokens", pa.list_(pa.int64())),
        ("boundaries", pa.list_(pa.int64())),
        ("boundary_scores", pa.list_(pa.float64())),
        ("decided_by", pa.list_(pa.string())),
        ("objective", pa.float64()),
        ("relaxed", pa.list_(pa.string())),
        ("judge_scores", pa.list_(pa.float64())),
        ("first_judge_scores", pa.list_(pa.float64())),
        ("made_by", pa.list_(pa.string())),
        ("judge_history", pa.string()),  # JSON: attempts per block
        ("blocks_kept", pa.int64()),  # fewer than blocks where the row was cut
        ("response_tokens", pa.int64()),
        ("escaped", pa.int64()),  # places where marker-like input text was escaped
        ("calls", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("dollars", pa.float64()),
        ("provenance", pa.string()),  # JSON
    ]
)
_CHAT = pa.schema([("id", pa.string()), ("text", pa.string())])
_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_MESSAGES = pa.schema([("id", pa.string()), ("messages", pa.list_(_TURN))])
_TABLES = {
    "default": _DEFAULT,
    "full": _FULL,
    "extras": _EXTRAS,
    "chat": _CHAT,
    "messages": _MESSAGES,
}
"""Folders to their columns. All are Parquet too: `datasets` reads one format per repository."""


class ExportOptions(Record):
    """What to write. `tokenizer`: a tokenizer.json or its folder, for the tokenized dataset."""

    chat_template: str = "memento_nosys"  # a template of this project, or the path of one
    tokenizer: Path | None = None
    mask_delimiters: bool = False  # of the model to be trained; decides the eviction spans
    name: str = Field(default="mementos", min_length=1)  # in the card


def write_outputs(
    folder: Path,
    traces: Iterable[Converted],
    counter: TokenCounter,
    options: ExportOptions | None = None,
    rows: AssembleOptions | None = None,
    rejected: Iterable[Rejected] = (),
) -> list[Path]:
    """Write all files and return them.

    Args:
        rows: what to do with over-long rows.
        rejected: input rows that never became traces.

    Raises:
        ConfigError: no such template or tokenizer, or one without the markers.
        DataError: a trace whose parts contradict each other.
    """
    options = options or ExportOptions()
    template = load_template(options.chat_template, options.tokenizer)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = RowTokenizer(options.tokenizer, template, options.mask_delimiters)
    stats = Stats(tokenizer=counter.name)
    with ExitStack() as stack:
        sinks: dict[str, Sink] = {}
        for name, sink in _sinks(folder, tokenizer):
            stack.enter_context(sink)
            sinks[name] = sink
        for done in traces:
            row = assemble_row(done, counter, rows) if done.status is Status.OK else None
            stats.add(done, row)
            if row is None or row.row is None:
                reason = done.reason if row is None else row.reason
                status = done.status if row is None else Status.FILTERED
                sinks["rejected"].write(_reject(done, status, reason))
                continue
            _write_row(sinks, done, row, template, tokenizer)
        for bad in rejected:
            stats.reject(bad)
            sinks["rejected"].write({"status": "rejected", **bad.model_dump()})
        paths = [sink.path for sink in sinks.values()]
    summary = stats.summary()
    write_whole(folder / "stats.json", json.dumps(summary, indent=2) + "\n")
    write_whole(folder / "README.md", render_card(options.name, summary, paths, folder))
    return [*paths, folder / "stats.json", folder / "README.md"]


def _sinks(folder: Path, tokenizer: RowTokenizer | None) -> Iterable[tuple[str, Sink]]:
    for name, schema in _TABLES.items():
        yield f"{name}.jsonl", JsonlSink(folder / name / "train.jsonl")
        yield f"{name}.parquet", ParquetSink(folder / name / "train.parquet", schema)
    if tokenizer is not None:
        yield "tokenized", ParquetSink(folder / "tokenized" / "train.parquet", TOKENIZED_SCHEMA)
    yield "rejected", JsonlSink(folder / "rejected.jsonl")


def _write_row(
    sinks: dict[str, Sink],
    done: Converted,
    assembled: Assembled,
    template: ChatTemplate,
    tokenizer: RowTokenizer | None,
) -> None:
    assert assembled.row is not None
    full = assembled.row.model_dump(mode="json")
    default = {name: full[name] for name in _DEFAULT.names}
    extras = _extras(done, assembled)
    prompt, response = template.render(full["problem"], full["response"])
    turns = zip(("user", "assistant"), (full["problem"], full["response"]), strict=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = {
        "default": default,
        "full": full,
        "extras": extras,
        "chat": {"id": done.trace.id, "text": prompt + response},
        "messages": {"id": done.trace.id, "messages": messages},
    }
    for name, row in rows.items():
        sinks[f"{name}.jsonl"].write(row)
        sinks[f"{name}.parquet"].write(row)
    if tokenizer is not None:
        tokens = tokenizer.tokenize(full["problem"], full["response"], assembled.blocks)
        sinks["tokenized"].write({"id": done.trace.id, **tokens._asdict()})


def _extras(done: Converted, assembled: Assembled) -> dict[str, Any]:
    sentences, scores, cut = done.sentences, done.scores, done.segmentation
    assert sentences is not None
    assert cut is not None
    kept = cut.blocks[: assembled.blocks]
    mementos = done.mementos[: assembled.blocks]
    return {
        "id": done.trace.id,
        "tokenizer": sentences.tokenizer,
        "sentence_edges": list(sentences.edges),
        "block_chars": [[block.char_start, block.char_end] for block in kept],
        "block_tokens": [block.tokens for block in kept],
        "memento_tokens": [memento.tokens for memento in mementos],
        "boundaries": list(scores.boundaries) if scores else None,
        "boundary_scores": list(scores.scores) if scores else None,
        "decided_by": list(scores.decided_by) if scores else None,
        "objective": cut.objective,
        "relaxed": list(cut.relaxed),
        "judge_scores": [memento.judge_score for memento in mementos],
        "first_judge_scores": [
            memento.history[0].judge_score if memento.history else None for memento in mementos
        ],
        "made_by": [memento.made_by for memento in mementos],
        "judge_history": json.dumps(
            [[attempt.model_dump() for attempt in memento.history] for memento in mementos],
            ensure_ascii=False,
        ),
        "blocks_kept": assembled.blocks,
        "response_tokens": assembled.tokens,
        "escaped": assembled.escaped,
        "calls": done.usage.calls,
        "prompt_tokens": done.usage.prompt_tokens,
        "completion_tokens": done.usage.completion_tokens,
        "dollars": done.usage.dollars,
        "provenance": json.dumps(done.trace.provenance, ensure_ascii=False, default=str),
    }


def _reject(done: Converted, status: Status, reason: str | None) -> dict[str, Any]:
    place = done.trace.provenance
    return {
        "id": done.trace.id,
        "status": status.value,
        "reason": reason,
        "file": place.get("file"),
        "row": place.get("row"),
    }
