"""A file of questions through one server: one JSON line per question, resumable at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from memento_frontend.answers_file import AnswersFile, Item, read_items
from memento_frontend.asking import Asking
from memento_frontend.native import NativeClient, Prompt
from memento_frontend.one_call import check_one_call, reason_in_one_call
from memento_frontend.options import Options
from memento_frontend.results import Reasoning
from memento_frontend.votes import majority
from memento_sgl.errors import (
    ConfigError,
    EndpointError,
    RefusedError,
    ServerError,
    StoppedError,
)

Ask = Callable[[Prompt], Sequence[Reasoning]]


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """Questions: all, answered before this run, answered in all, failed in all."""

    total: int
    earlier: int
    answered: int
    failed: int


def run_batch(
    questions: Path | str | Iterable[str | Mapping[str, Any]],
    out: Path | str,
    client: NativeClient,
    options: Options | None = None,
    *,
    attempts: int = 1,
    one_call: bool = False,
    concurrency: int = 16,
    retry_failed: bool = False,
    progress: bool = True,
) -> BatchSummary:
    """Ask all questions that `out` does not answer yet.

    Args:
        questions: a JSONL file, or texts or rows: objects with `question` or `messages`, and `id`
            if they shall not be numbered.
        out: results in the order in which they came; `docs/programs.md` has the format. Beside it
            lies `out` + ".settings.json".
        attempts: per question; the majority's answer counts.
        one_call: `reason_in_one_call` instead of the program with a call per step.
        concurrency: questions at the same time.
        retry_failed: ask those again that failed.

    Raises:
        ConfigError, RequestError: options that cannot work, found before the first question.
        DataError: a row that is no question, or two with one id.
        StoreError: `out` is in use, damaged, or was made with other settings or questions.
        StoppedError: the server went away; the same call goes on where this one ended.
    """
    options = options or Options()
    if attempts < 1 or concurrency < 1:
        raise ConfigError("attempts and concurrency must be at least 1")
    items = read_items(questions)
    ask = _ask(client, options, attempts, one_call)
    _probe(client, options)
    settings = {
        "model": client.info()["served_model_name"],
        "options": asdict(options),
        "attempts": attempts,
        "one_call": one_call,
    }
    with AnswersFile(Path(out), settings) as answers:
        earlier = answers.keep(items, retry_failed=retry_failed)
        todo = [item for item in items if item.id not in earlier]
        _Run(ask, client, answers, len(items), progress).all(todo, concurrency)
        return BatchSummary(len(items), len(earlier), answers.answered, answers.failed)


def _ask(client: NativeClient, options: Options, attempts: int, one_call: bool) -> Ask:
    if one_call:
        check_one_call(client, options)
        return lambda question: [
            reason_in_one_call(client, question, options) for _ in range(attempts)
        ]
    # Only here, so that the rest works without SGLang.
    from memento_frontend.endpoint import MementoEndpoint
    from memento_frontend.programs import reason, vote

    backend = MementoEndpoint(client=client)
    if attempts == 1:
        return lambda question: [
            reason.run(question, options, backend=backend, use_thread=False).ret_value
        ]
    return lambda question: (
        vote.run(question, attempts, options, backend=backend, use_thread=False).ret_value.attempts
    )


def _probe(client: NativeClient, options: Options) -> None:
    """One token with all options: what the server does not take fails here, not per question."""
    parts = (options.block, options.memento, options.answer)
    # Behind a thought, where answers are shaped.
    prompt = client.encode_chat("?") + client.encode("<think>\n</think>")
    for sampling in dict.fromkeys(parts):
        body = {"max_new_tokens": 1, **sampling.given(), **options.answer_shape()}
        try:
            client.generate(prompt, body, options.request())
        except RefusedError as error:
            raise ConfigError(f"these options do not work: {error}") from None


class _Run:
    """The questions of one run: what is asked, and what is written."""

    def __init__(
        self, ask: Ask, client: NativeClient, answers: AnswersFile, total: int, progress: bool
    ) -> None:
        self._ask = ask
        self._client = client
        self._answers = answers
        self._asking = Asking("questions", answers, total, progress=progress)

    def all(self, items: Sequence[Item], concurrency: int) -> None:
        """Ask; on Ctrl-C or a lost server end what runs, and keep what is finished."""
        try:
            self._asking.all(self._one, items, concurrency, self._abort)
        except EndpointError as error:
            raise StoppedError(
                f"{error}; {self._asking.done} of {self._asking.total} questions are done: give "
                "the same command to go on"
            ) from None

    def _abort(self) -> None:
        with contextlib.suppress(httpx.HTTPError):  # then its requests have ended too
            self._client.abort()

    def _one(self, item: Item) -> None:
        try:
            found = self._ask(item.question)
        except (RefusedError, ServerError) as error:
            self._answers.add(item, error=str(error))
            return
        if any(attempt.finish_reason == "abort" for attempt in found):
            if not self._asking.stopping.is_set():
                self._answers.add(item, error="the server aborted it")
        else:
            self._answers.add(item, vote=majority(found))
