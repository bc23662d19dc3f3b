"""Requests as files have them: text, token ids, training rows, rollout records, saved answers.

`FORMATS` is the list of shapes that an object in a JSON file may have. One more format is one
function and one line there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memento_sgl.chat_template import chat_environment
from memento_sgl.errors import DataError
from memento_sgl.observe.recorder import read_records
from memento_sgl.offline.rollout.record import RolloutRecord
from memento_sgl.rule.machine import Block, Eviction
from memento_sgl.templates import template

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Trace:
    """One request.

    Attributes:
        name: id or place in a file.
        prompt: text, token ids, or the number of tokens where the file has no more than that;
            None: the beginning of `output`, up to where the last assistant turn starts.
        output: text or token ids; the number of tokens where the file has no more than that.
        evictions: those that happened, where the file has them.
        accounting: the server's record, where the file has it.
        assistant_start: see `RequestOptions`.
        length: logical tokens of prompt and output as the server counted them.
        blocks: all complete blocks, where the file has no tokens to find them in.
    """

    name: str
    prompt: str | Sequence[int] | int | None
    output: str | Sequence[int] | int
    evictions: tuple[Eviction, ...] | None = None
    accounting: Mapping[str, Any] | None = None
    assistant_start: int | None = None
    length: int | None = None
    blocks: tuple[Block, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the number of its tokens depends on the tokenizer."""
        return isinstance(self.prompt, str) or isinstance(self.output, str)


class Format(NamedTuple):
    """A shape of JSON objects: those that have all of `keys`."""

    name: str
    keys: frozenset[str]
    read: Callable[[Mapping[str, Any], str], list[Trace]]


def traces_of(value: Any, name: str) -> list[Trace]:
    """The requests in one JSON value.

    Args:
        name: where it stands, for values without an id of their own.

    Raises:
        DataError: no known format, or one that is broken; says which.
    """
    if _is_ids(value):
        return [Trace(name, None, value)]
    if not isinstance(value, Mapping):
        raise DataError(f"expected an object or a list of token ids, got {type(value).__name__}")
    for format_ in FORMATS:
        if format_.keys <= value.keys():
            try:
                return format_.read(value, _own_name(value) or name)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                reason = str(error) if isinstance(error, DataError) else repr(error)
                raise DataError(f"{format_.name}: {reason}") from None
    known = "; ".join(f"{f.name} ({', '.join(sorted(f.keys))})" for f in FORMATS)
    raise DataError(f"keys {sorted(value)[:8]} are of no known format: {known}")


def _rollout(row: Mapping[str, Any], name: str) -> list[Trace]:
    record = RolloutRecord.parse(row)
    return [
        Trace(
            name,
            record.prompt_ids,
            record.output_ids,
            record.machine_evictions,
            assistant_start=record.assistant_start,
        )
    ]


def _request_trace(row: Mapping[str, Any], name: str) -> list[Trace]:
    """A trace file of the server (docs/traces.md): sizes and spans, neither text nor ids."""
    for part in ("blocks", "evictions"):
        if row["every"][part] != 1:
            raise DataError(f"it lists only every {row['every'][part]}th of its {part}")
    tokens = row["tokens"]
    blocks = tuple(Block(*(block[n] for n in Block._fields)) for block in row["blocks"])
    evictions = tuple(Eviction(*(e[n] for n in Eviction._fields)) for e in row["evictions"])
    return [
        Trace(
            name,
            tokens["prompt"],
            tokens["output"],
            evictions,
            row["accounting"],
            assistant_start=0,  # the file lists only blocks that count
            blocks=blocks,
        )
    ]


def _generated(row: Mapping[str, Any], name: str) -> list[Trace]:
    """An answer of the native `/generate`; it does not hold its prompt."""
    meta = row["meta_info"]
    record = meta.get("memento")
    output = row.get("output_ids") or _text(row["text"], "text")
    prompt, length = meta["prompt_tokens"], meta["prompt_tokens"] + meta["completion_tokens"]
    return [Trace(name, prompt, output, _evictions(record), record, length=length)]


def _openai(row: Mapping[str, Any], name: str) -> list[Trace]:
    """An OpenAI chat or text completion, one trace per choice; it does not hold its prompt."""
    records = read_records(row.get("metadata")) or [None] * len(row["choices"])
    prompt, several = row["usage"]["prompt_tokens"], len(row["choices"]) > 1
    length = None if several else prompt + row["usage"]["completion_tokens"]
    traces = []
    for number, (choice, record) in enumerate(zip(row["choices"], records, strict=True)):
        message = choice.get("message") or {}
        output = message.get("content") or choice.get("text") or ""
        if thought := message.get("reasoning_content"):
            output = f"<think>\n{thought}\n</think>\n{output}"
        one = f"{name}#{number}" if several else name
        traces.append(Trace(one, prompt, output, _evictions(record), record, length=length))
    return traces


def _reasoning(row: Mapping[str, Any], name: str) -> list[Trace]:
    """What `memento think --json` prints and an attempt of `memento batch`."""
    if not row.get("output_ids"):
        raise DataError("it holds no token ids: answers over the native interface do")
    record, prompt = row["accounting"], row["prompt_tokens"]
    return [Trace(name, prompt, row["output_ids"], _evictions(record), record)]


def _batch(row: Mapping[str, Any], name: str) -> list[Trace]:
    if not row["attempts"]:
        raise DataError(f"it failed: {row['error']}")
    return [
        trace
        for number, attempt in enumerate(row["attempts"])
        for trace in _reasoning(attempt, f"{name}#{number}")
    ]


def _ids(row: Mapping[str, Any], name: str) -> list[Trace]:
    prompt, output = row["prompt_ids"], row["output_ids"]
    if not (_is_ids(prompt) and _is_ids(output)):
        raise DataError("prompt_ids and output_ids must be lists of token ids")
    return [Trace(name, prompt, output)]


def _tokenized(row: Mapping[str, Any], name: str) -> list[Trace]:
    ids, prompt = row["input_ids"], row.get("prompt_tokens")
    if not _is_ids(ids):
        raise DataError("input_ids must be a list of token ids")
    if prompt is None:
        return [Trace(name, None, ids)]
    if not 0 <= prompt <= len(ids):
        raise DataError(f"prompt_tokens={prompt} of {len(ids)} input_ids")
    return [Trace(name, ids[:prompt], ids[prompt:], assistant_start=prompt)]


def _row(row: Mapping[str, Any], name: str) -> list[Trace]:
    """A training row; a problem is asked under the template `memento_nosys`."""
    response = _text(row["response"], "response")
    if row.get("problem") is None:
        return [Trace(name, "", response)]
    asked = [{"role": "user", "content": _text(row["problem"], "problem")}]
    prompt = _CHAT.render(messages=asked, add_generation_prompt=True)
    return [Trace(name, prompt, response + END_OF_TURN)]


def _chat_text(row: Mapping[str, Any], name: str) -> list[Trace]:
    return [Trace(name, None, _text(row["text"], "text"))]


FORMATS = (
    Format("rollout record", frozenset({"format", "prompt_ids", "output_ids"}), _rollout),
    Format("trace file", frozenset({"format", "every", "tokens", "blocks"}), _request_trace),
    Format("/generate answer", frozenset({"meta_info"}), _generated),
    Format("OpenAI answer", frozenset({"choices", "usage"}), _openai),
    Format("memento think answer", frozenset({"blocks", "answer", "accounting"}), _reasoning),
    Format("memento batch result", frozenset({"attempts", "error"}), _batch),
    Format("token ids", frozenset({"prompt_ids", "output_ids"}), _ids),
    Format("tokenized row", frozenset({"input_ids"}), _tokenized),
    Format("training row", frozenset({"response"}), _row),
    Format("chat text", frozenset({"text"}), _chat_text),
)
_CHAT = chat_environment().from_string(template("memento_nosys"))


def _own_name(value: Mapping[str, Any]) -> str | None:
    found = next((value[k] for k in ("id", "task_id", "uuid") if value.get(k) is not None), None)
    return None if found is None else str(found)


def _evictions(record: Mapping[str, Any] | None) -> tuple[Eviction, ...] | None:
    if record is None:
        return None
    spans = zip(record["evicted_spans"], record["eviction_points"], strict=True)
    return tuple(Eviction(point, start, end, point) for (start, end), point in spans)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and item >= 0 for item in value)
    )


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{column} is missing or not text")
    return value
