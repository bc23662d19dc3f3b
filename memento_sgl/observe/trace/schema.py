"""The trace file of one request: what it did with its KV cache, and when.

`docs/traces.md` is the guide, `docs/trace.schema.json` the schema. A file holds neither text nor
token ids, and is bounded: of long requests every n-th block is listed, and `every` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memento_sgl.errors import DataError

VERSION = 1
"""Raised with `format` by the first change that an older reader cannot take."""
MAX_BYTES = 256 * 1024
"""No trace file is larger."""
MAX_ENTRIES = 400
"""Most blocks, evictions and events, each, that a file lists."""
MAX_POINTS = 800
"""Most points of the KV curve."""
MAX_ID = 200


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TraceTimes(_Part):
    """Seconds since the scheduler got the request, from a monotonic clock."""

    prefill_start: float | None = Field(description="it left the queue; None: it never did")
    first_token: float | None = Field(description="None: it had none")
    answer: float | None = Field(description="its last thought ended; None: none did")
    end: float


class TraceTokens(_Part):
    """Tokens by phase. Markers and text between blocks belong to none of the last three."""

    prompt: int
    cached: int = Field(description="logical prompt tokens found in the prefix cache")
    output: int
    blocks: int = Field(description="inside complete blocks, of prompt and output")
    mementos: int = Field(description="inside their mementos")
    answer: int = Field(description="output tokens behind the last end of a thought")


class TraceBlock(_Part):
    """A complete block: logical indices of its four markers, and when each was sampled.

    A time is None for a marker of the prompt.
    """

    start: int
    end: int
    summary_start: int
    summary_end: int
    opened: float | None
    closed: float | None
    summary_opened: float | None
    summary_closed: float | None


class TraceEviction(_Part):
    """KV of logical indices `[start, end)` is gone for every query from `point` on.

    `time` and rows are None if the row began behind it, in the prefix cache.
    """

    start: int
    end: int
    point: int
    resume: int
    time: float | None
    rows_before: int | None
    rows_after: int | None


class TraceEvent(_Part):
    """Something else that happened.

    `index` is logical: of the marker (abandon, think, answer), the point of the eviction done again
    (replay), the ignored token's (void), the newest token's (retract), or how far the row reached
    that the request found in the radix tree (resume). `rows` is how many KV tokens stand before it.
    """

    time: float
    kind: Literal["abandon", "think", "answer", "void", "retract", "resume", "replay"]
    index: int
    rows: int


class TraceEvery(_Part):
    """n: the file lists every n-th entry only. `kv`: one high and one low point of n are kept."""

    blocks: int = 1
    evictions: int = 1
    events: int = 1
    kv: int = 1


class RequestTrace(_Part):
    """One finished request. Sums (`tokens`, `accounting`, `counts`) are always of everything."""

    model_config = ConfigDict(
        json_schema_extra={"$id": f"memento-trace-{VERSION}", "version": VERSION}
    )

    format: Literal["memento-trace-1"]
    id: str = Field(max_length=MAX_ID, description="request id, its first 200 characters")
    arrived: float = Field(description="wall clock, seconds since 1970")
    rank: int = Field(description="data-parallel rank of the scheduler")
    finish: str = Field(description="type of the finish reason: stop, length or abort")
    options: dict[str, Any] = Field(description="options in force, those at their default left out")
    times: TraceTimes
    tokens: TraceTokens
    accounting: dict[str, int] = Field(
        description='the numbers of `meta_info["memento"]`; lists are in `blocks`, `evictions`'
    )
    counts: dict[str, int] = Field(
        description="events by kind: also forced tokens, evictions, and those found in the cache"
    )
    blocks: list[TraceBlock]
    evictions: list[TraceEviction]
    events: list[TraceEvent]
    kv: list[tuple[float, int]] = Field(description="time, KV tokens in the request's row")
    every: TraceEvery

    @property
    def length(self) -> int:
        """Logical tokens, prompt and output."""
        return self.tokens.prompt + self.tokens.output


def read_trace(path: Path) -> RequestTrace:
    """Read one trace file.

    Raises:
        DataError: not readable, or not a trace file.
    """
    try:
        return RequestTrace.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise DataError(f"{path} is no memento trace: {where}{first['msg']}") from None
