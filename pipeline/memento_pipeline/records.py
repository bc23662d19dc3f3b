"""The records that travel between the stages, and the calls that make them.

Units: every offset is a code-point index into `Trace.thought`, half-open `[start, end)`; tokens are
those of one stated tokenizer (`Sentences.tokenizer`); *boundary* `b` lies between sentence `b` and
sentence `b + 1`; scores are 0-3 for boundaries and 0-10 for mementos. Records are frozen, know
nothing about files or models, and go to JSON and back with `model_dump_json()` and
`model_validate_json()`.

    read.read_traces(paths, options)                  -> Iterator[Trace | Rejected]
    read.why_filtered(trace, options, counter)        -> reason | None
    tokens.load_counter(name_or_path | None)          -> TokenCounter: .name, .count(text)
    split.split(thought, counter)                     -> Sentences
    rules.forced_scores(thought, sentences)           -> BoundaryScores   what needs no LLM call
    rules.rule_scores(thought, sentences)             -> BoundaryScores   all of it (baseline)
    segment.cut_blocks(sentences, scores, options)    -> Segmentation
    relax.cut_thought(thought, sentences, scores, ..) -> Segmentation     at lines if need be
    rules.extract_memento(block_text, counter, ...)   -> str              (baseline)
    checks.check_memento(block_text, memento, ...)    -> tuple[str, ...]  problems, empty if none
    assemble.assemble_row(converted, options)         -> Row
    export.write_outputs(folder, ...)                 files of stage 6
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Record(BaseModel):
    """Base of all records: frozen, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Status(StrEnum):
    OK = "ok"
    FILTERED = "filtered"  # looked at and left out on purpose
    FAILED = "failed"  # an error; may succeed when tried again


class Span(NamedTuple):
    """Half-open code-point range of a thought."""

    start: int
    end: int


class Trace(Record):
    """One input row.

    `thought` is the text between `<think>` and `</think>`, `answer` what follows; neither is
    stripped. `given_blocks` and `given_mementos` are set when the row was already cut into blocks
    (OpenMementos rows), so that a run can keep the cuts and only summarise again.
    """

    id: str = Field(min_length=1)
    problem: str
    thought: str
    answer: str = ""
    source: str | None = None
    domain: str | None = None
    difficulty: int | None = None
    closed: bool = True  # the row had a `</think>`
    given_blocks: tuple[Span, ...] = ()
    given_mementos: tuple[str, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)  # file, line or row, shape, ...


class Rejected(Record):
    """An input row that is not a trace; `row` counts from 1 (the line number in JSONL)."""

    file: str
    row: int
    reason: str
    excerpt: str = ""
    id: str | None = None


class Sentences(Record):
    """A thought cut into sentences that cover it without gap: `edges` has one entry more.

    Sentence `i` is `thought[edges[i]:edges[i + 1]]` and holds `tokens[i]` tokens (a token counts
    where its first character lies). `no_cut[b]` forbids a block to end at boundary `b`.
    """

    edges: tuple[int, ...]
    no_cut: tuple[bool, ...] = ()
    tokens: tuple[int, ...] = ()
    tokenizer: str

    @model_validator(mode="after")
    def _consistent(self) -> Sentences:
        count = len(self.edges) - 1
        if count < 0 or self.edges[0] != 0 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges must start at 0 and rise")
        if len(self.tokens) != count or len(self.no_cut) != max(count - 1, 0):
            raise ValueError("one token count per sentence and one flag per boundary expected")
        return self

    def __len__(self) -> int:
        return len(self.edges) - 1

    def span(self, first: int, last: int) -> Span:
        """Characters of sentences `first..last`, both included."""
        return Span(self.edges[first], self.edges[last + 1])

    def texts(self, thought: str) -> list[str]:
        """The sentences themselves; joined they are the thought."""
        return [thought[a:b] for a, b in zip(self.edges, self.edges[1:], strict=False)]

    @property
    def candidates(self) -> tuple[int, ...]:
        """Boundaries at which a block may end, rising."""
        return tuple(b for b, forbidden in enumerate(self.no_cut) if not forbidden)

    @property
    def units(self) -> tuple[tuple[int, int], ...]:
        """Inclusive sentence ranges between candidates: what a scoring prompt shows and numbers."""
        if not len(self):
            return ()
        ends = [*self.candidates, len(self) - 1]
        return tuple(zip([0, *(b + 1 for b in ends[:-1])], ends, strict=True))


DecidedBy = Literal["rule", "llm"]


class BoundaryScores(Record):
    """One score per candidate boundary; None where it is not known yet."""

    boundaries: tuple[int, ...]  # equals `Sentences.candidates`
    scores: tuple[float | None, ...]
    decided_by: tuple[DecidedBy | None, ...]

    @model_validator(mode="after")
    def _consistent(self) -> BoundaryScores:
        if not len(self.boundaries) == len(self.scores) == len(self.decided_by):
            raise ValueError("boundaries, scores and decided_by differ in length")
        for score, by in zip(self.scores, self.decided_by, strict=True):
            if (score is None) != (by is None):
                raise ValueError("a score and who decided it must be given together")
            if score is not None and not 0 <= score <= 3:
                raise ValueError(f"score {score} is not within 0-3")
        return self

    @property
    def unknown(self) -> tuple[int, ...]:
        """Positions (in `boundaries`) that still need a score."""
        return tuple(i for i, score in enumerate(self.scores) if score is None)


class Block(Record):
    """Sentences `first_sentence..last_sentence`, both included; their characters and tokens."""

    first_sentence: int
    last_sentence: int
    char_start: int
    char_end: int
    tokens: int

    def text(self, thought: str) -> str:
        return thought[self.char_start : self.char_end]


class Finer(Record):
    """Sentences and scores that take the place of those of the split; see `relax`."""

    sentences: Sentences
    scores: BoundaryScores


class Segmentation(Record):
    """The chosen blocks; together they cover the thought. `objective` is the value they reach."""

    blocks: tuple[Block, ...]
    objective: float
    relaxed: tuple[str, ...] = ()  # limits that could not be kept, in words
    finer: Finer | None = None  # what the blocks are made of, where the split was too coarse


class Attempt(Record):
    """One proposed memento of a block and what the judge said; None: not judged."""

    text: str
    judge_score: float | None = Field(None, ge=0, le=10)
    feedback: str | None = None
    problems: tuple[str, ...] = ()  # of the mechanical checks


class Memento(Record):
    """The kept memento of one block. `history` holds every attempt in order, the kept one too."""

    text: str
    tokens: int
    judge_score: float | None = Field(None, ge=0, le=10)
    feedback: str | None = None
    history: tuple[Attempt, ...] = ()
    passed: bool
    made_by: str  # model name, or "rules"


class Usage(Record):
    """What a trace cost. None means unknown, never zero."""

    calls: int = 0
    cached_calls: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt tokens, read from the endpoint's cache
    dollars: float | None = None


class Converted(Record):
    """A trace after all stages. Blocks and mementos pair up when `status` is ok."""

    trace: Trace
    status: Status
    reason: str | None = None  # why filtered or failed
    sentences: Sentences | None = None
    scores: BoundaryScores | None = None
    segmentation: Segmentation | None = None
    mementos: tuple[Memento, ...] = ()
    usage: Usage = Usage()

    @model_validator(mode="after")
    def _consistent(self) -> Converted:
        if (self.status is Status.OK) != (self.reason is None):
            raise ValueError("a reason belongs to every trace that is not ok, and to no other")
        if self.status is Status.OK:
            blocks = self.segmentation.blocks if self.segmentation else ()
            if self.sentences is None or not blocks or len(blocks) != len(self.mementos):
                raise ValueError("an ok trace needs sentences, blocks and one memento per block")
        return self


class Row(Record):
    """One output row: the `full` OpenMementos shape (its first five fields are `default`)."""

    problem: str
    response: str
    domain: str | None
    source: str | None
    difficulty: int | None
    sentences: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...]  # inclusive sentence ranges
    block_summaries: tuple[str, ...]


def blocks_of(sentences: Sentences, cuts: tuple[int, ...]) -> tuple[Block, ...]:
    """Blocks that end at the boundaries `cuts` (rising) and at the end of the thought."""
    if not len(sentences):
        return ()
    ends = [*cuts, len(sentences) - 1]
    starts = [0, *(cut + 1 for cut in cuts)]
    return tuple(
        Block(
            first_sentence=first,
            last_sentence=last,
            char_start=sentences.edges[first],
            char_end=sentences.edges[last + 1],
            tokens=sum(sentences.tokens[first : last + 1]),
        )
        for first, last in zip(starts, ends, strict=True)
    )
