"""All questions, all arms, any number of samples: resumable, and graded when all are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memento_frontend.answers_file import AnswersFile, Item
from memento_frontend.asking import Asking
from memento_frontend.client import Client, Question
from memento_frontend.collect import ReasoningBuilder
from memento_frontend.evaluation.questions import EvalQuestion
from memento_frontend.evaluation.summary import ArmSummary, summarize_arm
from memento_frontend.results import Reasoning
from memento_frontend.stream import OpenAIParser
from memento_frontend.think import request_config
from memento_frontend.votes import majority
from memento_sgl.errors import ConfigError, ServerError, StoppedError

KNOWN_ARMS: dict[str, dict[str, Any]] = {"on": {}, "off": {"keep_last_n_blocks": -1}}
FAILURES_IN_A_ROW = 8


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of asking.

    Attributes:
        base_url: of its server.
        memento: options of each request (docs/semantics.md).
    """

    name: str
    base_url: str
    memento: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, base_url: str) -> Arm:
        """`on`, `off`, `NAME@URL` or `NAME@URL{"option": value}`; the URL may be left out.

        Raises:
            ConfigError: an unknown name without a server or options of its own.
        """
        head, brace, tail = text.partition("{")
        name, _, url = head.partition("@")
        if not name:
            raise ConfigError(f"arm {text!r} has no name: NAME@URL")
        memento = KNOWN_ARMS.get(name, {})
        if brace:
            try:
                memento = json.loads(brace + tail)
            except ValueError as error:
                raise ConfigError(f"arm {name}: its options are not valid JSON: {error}") from None
        if name not in KNOWN_ARMS and not url and not brace:
            raise ConfigError(
                f"arm {name!r}: only {' and '.join(KNOWN_ARMS)} are known by name; give its server "
                f"({name}@http://...) or its options ({name}" + '{"keep_last_n_blocks": 1})'
            )
        return cls(name, url or base_url, memento)


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """How to ask; None leaves a choice to the server."""

    arms: Sequence[Arm]
    samples: int = 1
    model: str | None = None
    key_env: str | None = None
    temperature: float | None = 0.6
    top_p: float | None = 0.95
    top_k: int | None = 20
    max_tokens: int | None = 32768
    seed: int = 0
    concurrency: int = 16


def evaluate(
    questions: Sequence[EvalQuestion],
    out: Path,
    settings: EvalSettings,
    *,
    retry_failed: bool = False,
    progress: bool = True,
) -> dict[str, ArmSummary]:
    """Ask what `out` does not hold yet, then grade everything.

    Args:
        out: one JSON line per attempt, as of `memento batch`; beside it `out` + ".settings.json".

    Returns:
        The figures by arm.

    Raises:
        ConfigError: settings that cannot work.
        StoreError: `out` is in use, damaged, or was made with other settings or questions.
        StoppedError: a server went away; the same call goes on where this one ended.
    """
    names = [arm.name for arm in settings.arms]
    if not names or len(set(names)) < len(names):
        raise ConfigError("give at least one arm, each with a name of its own")
    if settings.samples < 1 or settings.concurrency < 1:
        raise ConfigError("samples and concurrency must be at least 1")
    items = [
        Item(f"{arm.name}/{question.id}/{sample}", question.text, asdict(question))
        for question in questions
        for sample in range(settings.samples)
        for arm in settings.arms
    ]
    asked = {name: value for name, value in asdict(settings).items() if name != "concurrency"}
    with AnswersFile(out, asked) as answers:
        earlier = answers.keep(items, retry_failed=retry_failed)
        todo = [item for item in items if item.id not in earlier]
        if todo:
            _Run(settings, answers, len(items), progress).all(todo)
    return grade_file(questions, out, settings)


def grade_file(
    questions: Sequence[EvalQuestion], out: Path, settings: EvalSettings
) -> dict[str, ArmSummary]:
    """The figures of a results file by arm, without asking anybody."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {arm.name: {} for arm in settings.arms}
    failed = dict.fromkeys(found, 0)
    with out.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            name = record["id"].partition("/")[0]
            if name not in found:
                continue
            if record["error"] is not None:
                failed[name] += 1
                continue
            attempts = found[name].setdefault(record["input"]["id"], [])
            attempts += record["attempts"]
    return {
        name: summarize_arm(questions, found[name], failed[name], seed=settings.seed)
        for name in found
    }


class _Run:
    """The attempts of one run: what is asked, and what is written."""

    def __init__(
        self, settings: EvalSettings, answers: AnswersFile, total: int, progress: bool
    ) -> None:
        self._settings = settings
        self._answers = answers
        self._failed_in_a_row = 0
        self._clients = {arm.name: Client(self._question(arm)) for arm in settings.arms}
        for client in self._clients.values():
            client.connect()
        self._configs = {
            name: request_config(client.server_options(), client.question)
            for name, client in self._clients.items()
        }
        self._asking = Asking("attempts", answers, total, progress=progress)

    def _question(self, arm: Arm) -> Question:
        settings = self._settings
        return Question(
            text="",
            base_url=arm.base_url,
            model=settings.model,
            key_env=settings.key_env,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens,
            memento=dict(arm.memento),
        )

    def all(self, items: Sequence[Item]) -> None:
        """Ask; on Ctrl-C or a lost server keep what is finished."""
        self._asking.all(self._one, items, self._settings.concurrency)

    def _one(self, item: Item) -> None:
        try:
            found = self._ask(item)
        except ServerError as error:
            self._answers.add(item, error=str(error))
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= FAILURES_IN_A_ROW:
                raise StoppedError(
                    f"{self._failed_in_a_row} requests failed in a row, the last one: {error}; "
                    f"{self._asking.done} of {self._asking.total} attempts are done: mend it and "
                    "give the same command with --retry-failed"
                ) from None
        else:
            if found is not None:
                self._failed_in_a_row = 0
                self._answers.add(item, vote=majority([found]))

    def _ask(self, item: Item) -> Reasoning | None:
        name = item.id.partition("/")[0]
        client = self._clients[name].about(str(item.question))
        parser, builder = OpenAIParser(self._configs[name]), ReasoningBuilder()
        with closing(client.stream()) as chunks:
            for chunk in chunks:
                if self._asking.stopping.is_set():
                    return None
                for event in parser.feed(chunk):
                    builder.add(event)
        for event in parser.finish():
            builder.add(event)
        found = builder.reasoning()
        if found.finish_reason == "abort":
            raise ServerError("the server aborted it")
        return found
