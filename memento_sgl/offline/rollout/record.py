"""One request as a trainer needs it: tokens, log-probabilities, spans, eviction points.

A record holds all that the attention mask and the log-probabilities depend on, apart from the
weights. `docs/rollouts.md` is the guide. Reading and writing need neither torch nor SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memento_sgl.errors import DataError
from memento_sgl.offline.rollout.checks import (
    Span,
    check_accounting,
    check_evictions,
    check_permitted,
    check_spans,
)
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.emission import NO_STRUCTURE, Permitted, Structure, permitted, special_tokens
from memento_sgl.rule.machine import BlockMachine, Eviction, section_start_of
from memento_sgl.rule.markers import MarkerIds

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from memento_sgl.offline.reference import MaskedSequence

Run = tuple[int, bool, list[int]]
STANDARD = MementoConfig(enable=True, mask_delimiters=False)


class RolloutRecord(BaseModel):
    """One request; immutable. All positions are logical indices into prompt + output.

    Spans are half-open, without their markers. Blocks that were kept (the last ones, or those
    whose memento the very last token closed) have spans but no eviction.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["memento-rollout-1"] = "memento-rollout-1"
    id: str | None = None
    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float] | None = Field(
        None, description="of each output token, as the server reported it"
    )
    temperature: float = Field(
        1.0, gt=0, description="by which logits are divided before `logprobs` are taken"
    )
    special_ids: list[int] = Field(
        default_factory=list, description="tokens that constrained emission allows one by one"
    )
    permitted: list[Run] = Field(
        default_factory=list,
        description="constrained emission: [index, text, allowed], from `index` to that of the "
        "next entry these special tokens could be sampled, and all others if `text`",
    )
    block_spans: list[Span]
    memento_spans: list[Span]
    evictions: list[tuple[int, int, int, int]] = Field(
        description="[point, start, end, resume]: queries from `point` on do not see [start, end); "
        "in restart mode KV of [resume, point) was computed again, else resume is point"
    )
    assistant_start: int | None = None
    finish_reason: str | None = None
    weight_version: str | None = None
    weight_versions: list[tuple[str, int, int]] = Field(
        default_factory=list,
        description="[version, start, end] of `output_ids`: what sampled them, if weights were "
        "loaded meanwhile",
    )

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt_ids, *self.output_ids]

    def _repr_html_(self) -> str:
        """Sizes and spans as a table, for notebooks; the tokens are not text."""
        rows = {
            "id": self.id,
            "prompt, output": f"{len(self.prompt_ids):,}, {len(self.output_ids):,} tokens",
            "blocks": [end - start for start, end in self.block_spans],
            "mementos": [end - start for start, end in self.memento_spans],
            "evicted": [f"[{start}, {end}) at {point}" for point, start, end, _ in self.evictions],
            "finish": self.finish_reason,
        }
        cells = "".join(
            f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items()
        )
        return f"<table>{cells}</table>"

    @property
    def machine_evictions(self) -> tuple[Eviction, ...]:
        return tuple(Eviction(*eviction) for eviction in self.evictions)

    @property
    def forced(self) -> list[int]:
        """Output tokens that were the only ones permitted: not the model's choice."""
        return [
            index
            for start, end, may in self._runs()
            if not may.text and len(may.special) == 1
            for index in range(start, end)
        ]

    @classmethod
    def parse(cls, row: Mapping[str, Any] | str | bytes) -> RolloutRecord:
        """Read one record: a JSON object or its text.

        Raises:
            DataError: not a record, or one that contradicts itself; says where.
        """
        text = json.dumps(row) if isinstance(row, Mapping) else row
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(_explain(error)) from None

    @classmethod
    def from_generate(
        cls,
        answer: Mapping[str, Any],
        prompt_ids: Sequence[int],
        markers: MarkerIds,
        *,
        config: MementoConfig = STANDARD,
        options: Mapping[str, Any] | None = None,
        structure: Structure = NO_STRUCTURE,
        temperature: float = 1.0,
        id: str | None = None,
    ) -> RolloutRecord:
        """The record of one answer of `/generate` or `Engine.generate`.

        Args:
            answer: with `output_ids` and `meta_info`; log-probabilities if it has them.
            markers: token ids, of `resolve_markers`.
            config: the server's options, `mask_delimiters` settled.
            options: what the request sent as `custom_params["memento"]`.
            structure: of `emission.resolve_structure`, where `constrain` was "strict".
            temperature: of the request; 0 is greedy, whose log-probabilities are at 1.

        Raises:
            DataError: the answer is not one to this prompt under these options.
            RequestError: the options cannot work.
        """
        if missing := {"meta_info", "output_ids"} - answer.keys():
            raise DataError(f"the answer has no {' and no '.join(sorted(missing))}: ask /generate")
        meta, output = answer["meta_info"], list(answer["output_ids"])
        asked = RequestOptions.parse(dict(options) if options else None)
        merged = config.for_request(asked)
        start = section_start_of(prompt_ids, merged, markers, asked.assistant_start)
        machine = BlockMachine(markers, merged, section_start=start)
        machine.feed_all(prompt_ids)
        runs = _feed(machine, output, len(prompt_ids), structure)
        length = len(prompt_ids) + len(output)
        check_accounting(meta, machine, len(prompt_ids), length)
        values = {
            "id": id,
            "prompt_ids": list(prompt_ids),
            "output_ids": output,
            "logprobs": _logprobs(meta.get("output_token_logprobs"), output),
            "temperature": float(temperature) or 1.0,
            "special_ids": special_tokens(markers, structure) if runs else [],
            "permitted": runs,
            "block_spans": [(block.start + 1, block.end) for block in machine.blocks],
            "memento_spans": [(b.summary_start + 1, b.summary_end) for b in machine.blocks],
            "evictions": [tuple(e) for e in machine.evictions if e.point < length - 1],
            "assistant_start": asked.assistant_start,
            "finish_reason": (meta.get("finish_reason") or {}).get("type"),
            "weight_version": meta.get("weight_version"),
            "weight_versions": [
                (span["version"], span["start"], span["end"])
                for span in meta.get("weight_versions", ())
            ],
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise DataError(_explain(error)) from None

    def layout(self) -> MaskedSequence:
        """The exact attention mask, ready for one forward pass; needs torch.

        Outside of restart mode `layout().visible` is a plain `[T, T]` mask over the tokens.
        """
        from memento_sgl.offline.reference import lay_out

        return lay_out(self.machine_evictions, len(self.prompt_ids) + len(self.output_ids))

    def recompute_logprobs(self, model: PreTrainedModel) -> torch.Tensor:
        """Log-probability of each output token under these weights, at `temperature`; float `[O]`.

        One masked forward pass of the reference implementation. Constrained emission is applied;
        penalties, biases and grammars that changed the logits are not known here.
        """
        import torch

        from memento_sgl.offline.reference import constrained, masked_logits

        before = len(self.prompt_ids)
        logits = masked_logits(model, self.tokens, self.machine_evictions)
        rows = logits[before - 1 : -1].float() / self.temperature
        for start, end, may in self._runs():
            rows[start - before : end - before] += constrained(
                torch.zeros_like(rows[0]), may, self.special_ids
            )
        chosen = torch.tensor(self.output_ids, device=rows.device)[:, None]
        logprobs: torch.Tensor = rows.log_softmax(-1).gather(1, chosen)[:, 0]
        return logprobs

    def _runs(self) -> Iterator[tuple[int, int, Permitted]]:
        """Output tokens `[start, end)` and what could be sampled there."""
        ends = [index for index, _, _ in self.permitted[1:]]
        ends.append(len(self.prompt_ids) + len(self.output_ids))
        for (start, text, allowed), end in zip(self.permitted, ends, strict=False):
            yield start, end, Permitted(text, frozenset(allowed))

    @model_validator(mode="after")
    def _consistent(self) -> RolloutRecord:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty")
        if self.logprobs is not None and len(self.logprobs) != len(self.output_ids):
            raise ValueError(f"{len(self.logprobs)} logprobs for {len(self.output_ids)} output_ids")
        tokens = self.tokens
        check_permitted(list(self._runs()), tokens, self.special_ids, len(self.prompt_ids))
        check_spans(tokens, self.block_spans, self.memento_spans)
        check_evictions(self.machine_evictions, self.block_spans, len(tokens))
        return self


def read_rollouts(path: str | Path) -> Iterator[RolloutRecord]:
    """Records of a JSONL file.

    Raises:
        DataError: a line is no record, or contradicts itself; says which line.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield RolloutRecord.parse(line)
                except DataError as error:
                    raise DataError(f"{path}:{number}: {error}") from None


def write_rollouts(path: str | Path, records: Iterable[RolloutRecord]) -> int:
    """Write a JSONL file; returns the number of records."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.model_dump_json() + "\n")
            count += 1
    return count


def _feed(
    machine: BlockMachine, output: Sequence[int], prompt_len: int, structure: Structure
) -> list[Run]:
    """Feed the output; what could be sampled wherever that changes, if it was constrained."""
    config, markers = machine.config, machine.markers
    if config.emission == "off":
        machine.feed_all(output, start=prompt_len)
        return []
    runs: list[Run] = []
    last: Permitted | None = None
    for index, token in enumerate(output, start=prompt_len):
        may = permitted(machine, index, config, markers, structure)
        if may != last:
            runs.append((index, may.text, sorted(may.special)))
            last = may
        machine.feed_all([token], start=index)
    return runs


def _logprobs(entries: Sequence[Sequence[Any]] | None, output: list[int]) -> list[float] | None:
    if entries is None:
        return None
    if [entry[1] for entry in entries] != output:
        raise DataError("output_token_logprobs are of other tokens than output_ids")
    return [float(entry[0]) for entry in entries]


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}" if where else message)
    return "not a rollout record: " + "; ".join(lines[:5])
