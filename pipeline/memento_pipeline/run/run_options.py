"""All options of a run in one record: what the command line fills in and a cluster ships around."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from memento_pipeline import RULES
from memento_pipeline.llm.endpoints import AskOptions, Endpoint
from memento_pipeline.llm.prompts import fingerprint
from memento_pipeline.output.assemble import AssembleOptions
from memento_pipeline.output.export import ExportOptions
from memento_pipeline.read.rows import ReadOptions
from memento_pipeline.records import Record
from memento_pipeline.stages.score import ScoreOptions
from memento_pipeline.stages.segment import SegmentOptions
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_pipeline.store.schema import Settings
from memento_sgl.errors import ConfigError

"""The model name of the offline baseline."""


NEWER = ("require_answer", "generations", "split")
"""Options of reading that count as settings only where they are given."""


class Shard(NamedTuple):
    """Part `part` of `parts`, counted from 0."""

    part: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `i/n` with i from 1 to n.

        Raises:
            ConfigError: it is not that.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ConfigError(f"--shard expects i/n, for example 2/8, not {text!r}")
        if not 1 <= int(index) <= int(count):
            raise ConfigError(f"--shard {text}: i goes from 1 to n")
        return cls(int(index) - 1, int(count))

    def __str__(self) -> str:
        return f"{self.part + 1}/{self.parts}"


class RunOptions(Record):
    """What one run does. `settings` is the part that decides the results."""

    inputs: tuple[Path, ...] = ()
    out: Path
    endpoints: tuple[Endpoint, ...] = ()  # none: rules
    tokenizer: str | None = None
    read: ReadOptions = Field(default_factory=ReadOptions)
    score: ScoreOptions = Field(default_factory=ScoreOptions)
    segment: SegmentOptions = Field(default_factory=SegmentOptions)
    summarize: SummarizeOptions = Field(default_factory=SummarizeOptions)
    ask: AskOptions = Field(default_factory=AskOptions)
    rows: AssembleOptions = Field(default_factory=AssembleOptions)
    export: ExportOptions = Field(default_factory=ExportOptions)
    limit: int | None = Field(default=None, ge=1)
    shard: Shard = Shard(0, 1)
    open_traces: int | None = Field(default=None, ge=1)

    @property
    def models(self) -> list[str]:
        return sorted({endpoint.model for endpoint in self.endpoints}) or [RULES]

    @property
    def most_open(self) -> int:
        """Traces worked on at once: some more than requests, since not all wait for an answer."""
        if self.open_traces is not None:
            return self.open_traces
        return self.ask.concurrency + max(8, self.ask.concurrency // 4) if self.endpoints else 8

    def settings(self, tokenizer: str) -> Settings:
        """Stage to the options that decide its result; see `Store`."""
        asked: dict[str, Any] = {"models": self.models}
        if self.endpoints:
            asked |= {"sampling": self.ask.sampling(), "prompts": fingerprint()}
        own = self.model_dump(mode="json", include={"read", "score", "segment", "summarize"})
        for stage in ("score", "summarize"):
            del own[stage]["tries"]
        for name in NEWER:  # folders that were started without them go on
            if own["read"][name] == ReadOptions.model_fields[name].default:
                del own["read"][name]
        return {
            "split": own["read"] | {"tokenizer": tokenizer, "shard": str(self.shard)},
            "score": asked | own["score"],
            "segment": own["segment"],
            "summarize": asked | own["summarize"],
        }
