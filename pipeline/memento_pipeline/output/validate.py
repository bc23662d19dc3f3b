"""A check that any row or file of training data can be run through: `memento validate`.

The structure is judged by the same state machine that the engine runs; the `full` columns must say
the same as the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memento_pipeline.output.assemble import END_THINK, THINK, parse_response
from memento_pipeline.read.files import ROW_FOLDERS, STORE, data_files, list_files
from memento_pipeline.text.pairs import MARKERS
from memento_sgl.errors import DataError
from memento_sgl.offline.inputs.rows import TABLES, Broken, named_like, read_values
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine
from memento_sgl.rule.markers import MarkerIds

_SPECIAL = re.compile(r"<[|｜][^\s<>|｜]{1,64}[|｜]>|</?think>")
_IDS = MarkerIds(1, 2, 3, 4)
_CONFIG = MementoConfig.parse(
    {"enable": True, "mask_delimiters": False, "require_assistant_section": False}
)
_TEXT_COLUMNS = ("problem", "response")


class RowReport(NamedTuple):
    """Problems of one row, empty if it is valid. `row` counts from 1, and the rows with this number
    in all files of `group` are the same trace."""

    file: Path
    row: int
    problems: tuple[str, ...]
    group: Path


def validate_files(paths: Sequence[Path]) -> Iterator[RowReport]:
    """A report for every row of files and folders. Of a work folder the row files are checked, not
    its logs.

    Raises:
        ConfigError: a path is missing or of an unknown kind.
        DataError: a Parquet or Arrow file that cannot be read.
    """
    for group, files in _groups(paths):
        counts: dict[Path, int] = {}
        for file in files:
            counts[file] = 0
            for number, row in read_values(file):
                if isinstance(row, Broken) and named_like(file, TABLES):
                    raise DataError(row.reason)
                counts[file] += 1
                problems = [row.reason] if isinstance(row, Broken) else validate_row(row)
                yield RowReport(file, number, tuple(problems), group)
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{file.relative_to(group.parent)} {n}" for file, n in counts.items())
            yield RowReport(
                files[0], max(counts.values()) + 1, (f"row counts differ: {said}",), group
            )


def _groups(paths: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Files that hold the same rows in other forms: all of a work folder, and those of one name."""
    for path in paths:
        tables = [folder for name in ROW_FOLDERS if (folder := path / name).is_dir()]
        if tables or (path / STORE).is_file():
            yield path, [file for folder in tables for file in data_files(folder)]
            continue
        named: dict[Path, list[Path]] = {}
        for file in data_files(path) if path.is_dir() else list_files([path]):
            named.setdefault(file.with_name(file.name.split(".")[0]), []).append(file)
        yield from named.items()


def validate_row(row: Any) -> list[str]:
    """Problems of a row in the `default`, `full`, `messages`, chat-text or tokenized shape."""
    if not isinstance(row, Mapping):
        return [f"expected an object, got {type(row).__name__}"]
    if "input_ids" in row:
        return _tokenized(row)
    if "response" not in row and isinstance(row.get("text"), str):
        return _structure(row["text"]) + _answered(row["text"])
    if "response" not in row and isinstance(row.get("messages"), list):
        return _messages(row["messages"])
    for column in _TEXT_COLUMNS:
        if not isinstance(row.get(column), str) or not row[column].strip():
            return [f"{column} is missing or not text"]
    problems = _structure(row["response"]) + _frame(row["response"])
    if found := _SPECIAL.findall(row["problem"]):
        problems.append(f"special tokens in the problem: {', '.join(sorted(set(found)))}")
    problems += _types(row)
    full = [
        name for name in ("sentences", "blocks", "block_summaries") if row.get(name) is not None
    ]
    if len(full) == 3:
        problems += _full(row)
    elif full:
        problems.append(f"only {', '.join(full)} of the three columns of the full shape")
    return problems


def _structure(text: str) -> list[str]:
    """Every marker must belong to a complete block with its own memento."""
    machine = BlockMachine(_IDS, _CONFIG)
    ids = {marker: number for number, marker in enumerate(MARKERS, start=1)}
    markers = [ids[m] for m in re.findall("|".join(map(re.escape, MARKERS)), text)]
    if not markers:
        return ["no block"]
    machine.feed_all(markers)
    complete = len(machine.blocks)
    if markers == [1, 2, 3, 4] * complete:
        return []
    return [
        f"markers do not form whole blocks: {complete} complete, but "
        + ", ".join(f"{markers.count(ids[m])} {m}" for m in MARKERS)
    ]


def _messages(messages: Sequence[Any]) -> list[str]:
    """One question and one answer, judged like problem and response."""
    said = [turn.get("content") for turn in messages if isinstance(turn, Mapping)]
    roles = [turn.get("role") for turn in messages if isinstance(turn, Mapping)]
    if roles != ["user", "assistant"]:
        return [f"messages of {roles} instead of user and assistant"]
    return validate_row({"problem": said[0], "response": said[1]})


def _answered(text: str) -> list[str]:
    """Chat text must say something between the thought and the marks that end the turn."""
    answer = _SPECIAL.sub("", text.rpartition(END_THINK)[2])
    return [] if answer.strip() else [f"no answer after {END_THINK}"]


def _frame(response: str) -> list[str]:
    problems = []
    if not response.startswith(THINK):
        problems.append(f"the response does not start with {THINK}")
    for tag in (THINK, END_THINK):
        if response.count(tag) != 1:
            problems.append(f"{response.count(tag)} {tag} instead of one")
    parsed = parse_response(response)
    if parsed.outside and not _SPECIAL.search(parsed.outside):
        problems.append(f"thought outside the blocks: {parsed.outside[:60]!r}")
    inner = [*parsed.blocks, *parsed.mementos]
    if parsed.answer is not None and not parsed.answer.strip():
        problems.append(f"no answer after {END_THINK}")
    stray = {token for text in inner for token in _SPECIAL.findall(text)}
    stray |= set(_SPECIAL.findall(parsed.answer or "")) - {END_THINK}
    if stray:
        problems.append(f"special tokens inside text: {', '.join(sorted(stray))}")
    for kind, texts in (("block", parsed.blocks), ("memento", parsed.mementos)):
        if empty := [i for i, text in enumerate(texts) if not text.strip()]:
            problems.append(f"empty {kind}: {empty[:5]}")
    return problems


def _types(row: Mapping[str, Any]) -> list[str]:
    problems = []
    for column in ("domain", "source"):
        if not isinstance(row.get(column), str | None):
            problems.append(f"{column} must be text or null")
    difficulty = row.get("difficulty")
    if isinstance(difficulty, bool) or not isinstance(difficulty, int | None):
        problems.append(f"difficulty must be a whole number or null, not {difficulty!r}")
    return problems


def _full(row: Mapping[str, Any]) -> list[str]:
    sentences, spans, mementos = row["sentences"], row["blocks"], row["block_summaries"]
    parsed = parse_response(row["response"])
    if not len(spans) == len(mementos) == len(parsed.blocks):
        return [
            f"{len(spans)} block ranges, {len(mementos)} summaries, {len(parsed.blocks)} blocks in "
            "the response"
        ]
    problems = []
    expected = 0
    for number, (span, memento) in enumerate(zip(spans, mementos, strict=True)):
        if len(span) != 2 or span[0] != expected or not span[0] <= span[1] < len(sentences):
            problems.append(f"block {number}: range {list(span)} does not follow {expected - 1}")
            break
        expected = span[1] + 1
        if "".join(sentences[span[0] : expected]) != parsed.blocks[number]:
            problems.append(f"block {number}: its sentences are not the text in the response")
        if memento.strip() != parsed.mementos[number].strip():
            problems.append(f"block {number}: its summary is not the one in the response")
    else:
        if expected != len(sentences):
            problems.append(f"{len(sentences) - expected} sentences belong to no block")
    return problems


def _tokenized(row: Mapping[str, Any]) -> list[str]:
    ids, labels = row["input_ids"], row.get("labels")
    if not isinstance(labels, list) or len(labels) != len(ids):
        return ["labels are missing or differ in length from input_ids"]
    problems = []
    prompt = row.get("prompt_tokens", 0)
    if any(label != -100 for label in labels[:prompt]):
        problems.append("labels of the prompt are not -100")
    if labels[prompt:] != ids[prompt:]:
        problems.append("labels of the response are not its tokens")
    blocks, mementos = row.get("block_spans") or [], row.get("memento_spans") or []
    if not blocks or len(blocks) != len(mementos):
        return [*problems, f"{len(blocks)} block spans and {len(mementos)} memento spans"]
    order = [edge for pair in zip(blocks, mementos, strict=True) for span in pair for edge in span]
    if order != sorted(order) or order[0] <= prompt or order[-1] >= len(ids):
        return [*problems, "spans overlap or leave the response"]
    for kind, spans in (("block", blocks), ("memento", mementos)):
        if len({(ids[start - 1], ids[end]) for start, end in spans}) != 1:
            problems.append(f"{kind} spans do not all stand between the same two markers")
    for point, start, end in row.get("evictions") or []:
        if not (start < end <= point < len(ids)):
            problems.append(f"eviction {[point, start, end]} is not possible")
    return problems
