"""Reasoning in blocks as programs of SGLang's frontend language: one engine call per step.

    between   ... <|block_start|>                         or </think>
    block     ... <|block_end|>
    memento   <|summary_start|> ... <|summary_end|>
    answer    ... end of sequence

The steps only cut up one sequence: with greedy sampling they give the tokens that a single call
gives. Each call reads what the last one wrote, and no more: all else is in the radix tree, finished
blocks as nodes without KV.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sglang
from sglang.lang.interpreter import ProgramState

from memento_frontend.endpoint import MementoEndpoint
from memento_frontend.join_calls import assemble, whole_record
from memento_frontend.native import THINK_END, Prompt
from memento_frontend.options import Options, Sampling
from memento_frontend.results import Reasoning
from memento_frontend.votes import Vote, majority
from memento_sgl.errors import ConfigError, EndpointError
from memento_sgl.rule.machine import State

CLOSE = f"\n{THINK_END}"
"""What a program writes after its last permitted block, as training data has it."""


def _reason(s: ProgramState, question: Prompt, options: Options | None = None) -> Reasoning:
    options = options or Options()
    prompt = _endpoint(s).begin(s, question, options.request())
    return _Attempt(s, prompt, options).run()


def _vote(s: ProgramState, question: Prompt, attempts: int, options: Options | None = None) -> Vote:
    if attempts < 1:
        raise ConfigError(f"attempts must be at least 1, not {attempts}")
    options = options or Options()
    prompt = _endpoint(s).begin(s, question, options.request())
    forks = s.fork(attempts)
    try:
        with ThreadPoolExecutor(attempts) as pool:
            runs = [_Attempt(fork, prompt, options).run for fork in forks.states]
            found = tuple(pool.map(lambda run: run(), runs))
    finally:
        for fork in forks.states:
            fork.stream_executor.end()
    return majority(found)


reason = sglang.function(_reason)
"""Program: `reason.run(question, options, backend=endpoint).ret_value` is a `Reasoning`.

`question` is a text or a list of chat messages. Sampling parameters given to `run` hold where
`options` leaves them open.
"""

vote = sglang.function(_vote)
"""Program: `vote.run(question, attempts, options, backend=...).ret_value` is a `Vote`.

The attempts run at the same time and share the prompt's KV. They differ by sampling only.
"""


def _endpoint(s: ProgramState) -> MementoEndpoint:
    backend = s.stream_executor.backend
    if not isinstance(backend, MementoEndpoint):
        raise ConfigError(
            f"this program needs backend=MementoEndpoint(url), not {type(backend).__name__}: "
            "others do not keep token ids"
        )
    return backend


class _Attempt:
    """One thought and its answer, call by call."""

    def __init__(self, s: ProgramState, prompt: tuple[int, ...], options: Options) -> None:
        self._s = s
        self._endpoint = _endpoint(s)
        self._client = self._endpoint.client
        self._prompt = prompt
        self._prompt_text: str = s.text()
        self._options = options
        self._most = self._client.room(prompt, options.max_tokens)
        self._output: list[int] = []
        self._machine = self._client.machine(prompt, options.server.get("assistant_start"))
        self._before = len(self._machine.blocks)
        self._thinking = True
        self._calls = 0
        self._finish: str | None = None
        self._record: dict[str, Any] | None = None
        self._recorded = 0  # logical tokens that the record is about

    def run(self) -> Reasoning:
        while self._finish is None:
            if self._left <= 0:
                self._finish = "length"
            else:
                self._step()
        meta: dict[str, Any] = {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": len(self._output),
            "finish_reason": {"type": self._finish},
        }
        if self._record is not None:
            meta["memento"] = whole_record(self._record, len(self._prompt), self._recorded)
        text = self._s.text()[len(self._prompt_text) :]
        return assemble(self._client, self._prompt_text, text, self._output, meta)

    def _step(self) -> None:
        options, markers = self._options, self._client.markers
        state = self._machine.state_before(self._length)
        if not self._thinking:
            self._call("answer", (), options.answer, options.max_answer_tokens, last=True)
        elif state is State.BLOCK:
            self._call("block", (markers.block_end,), options.block)
        elif state in (State.CLOSED, State.MEMENTO):
            self._call("memento", (markers.summary_end, markers.block_start), options.memento)
        elif self._full:
            self._write(CLOSE)
            self._thinking = False
        else:
            self._call("between", (markers.block_start,), options.block)

    @property
    def _length(self) -> int:
        """Logical tokens so far."""
        return len(self._prompt) + len(self._output)

    @property
    def _left(self) -> int:
        """Tokens that may still be generated."""
        return self._most - len(self._output)

    @property
    def _full(self) -> bool:
        """Whether the program itself has to end the thought."""
        most = self._options.max_blocks
        done = len(self._machine.blocks) - self._before
        return most is not None and not self._options.strict and done >= most

    def _call(
        self,
        part: str,
        stops: tuple[int, ...],
        sampling: Sampling,
        limit: int | None = None,
        *,
        last: bool = False,
    ) -> None:
        """One engine call; `</think>` ends every part of a thought."""
        think_end = self._client.markers.think_end
        extra: dict[str, Any] = dict(self._options.answer_shape()) if last else {}
        if not last and think_end is None:
            extra["stop"] = [THINK_END]
        elif not last and think_end is not None:
            stops = (*stops, think_end)
        self._calls += 1
        name = f"{part}_{self._calls}"
        self._s += sglang.gen(
            name,
            max_tokens=min(self._left, limit or self._left),
            stop_token_ids=list(stops),
            **sampling.given(),
            **extra,
        )
        self._take(self._meta(name), stops, last)

    def _meta(self, name: str) -> dict[str, Any]:
        meta: dict[str, Any] | None = self._s.get_meta_info(name)
        if meta is not None:
            return meta
        # The thread of the program sets its events before it says why it ended.
        executor = self._s.stream_executor
        executor.worker.join()
        raise executor.error_ or EndpointError(f"{name} gave nothing")

    def _take(self, meta: dict[str, Any], stops: tuple[int, ...], last: bool) -> None:
        reason = meta["finish_reason"]
        matched = reason.get("matched")
        if reason["type"] != "stop" or last or not (matched in stops or matched == THINK_END):
            self._finish = reason["type"]
        elif matched in (self._client.markers.think_end, THINK_END):
            self._thinking = False
        self._feed(meta["output_ids"])
        record = meta.get("memento")
        if record is not None and self._record is not None and "measured_peak_kv_tokens" in record:
            peaks = (r.get("measured_peak_kv_tokens", 0) for r in (record, self._record))
            record = {**record, "measured_peak_kv_tokens": max(peaks)}
        self._record = record
        self._recorded = self._length

    def _write(self, text: str) -> None:
        """Add text of the program's own."""
        before = len(self._endpoint.ids(self._s))
        self._s += text
        self._feed(list(self._endpoint.ids(self._s)[before:]))

    def _feed(self, ids: list[int]) -> None:
        self._machine.feed_all(ids, start=self._length)
        self._output += ids
