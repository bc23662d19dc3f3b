"""`memento think`: one question to a running server, shown while the answer comes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from enum import IntEnum

from rich.console import Console

from memento_frontend.client import Client, Question
from memento_frontend.collect import ReasoningBuilder
from memento_frontend.gauge import KvGauge
from memento_frontend.results import Reasoning
from memento_frontend.show import LiveView, PlainView, View
from memento_frontend.stream import OpenAIParser
from memento_sgl.errors import ConfigError, MementoError
from memento_sgl.rule.config import MementoConfig


class Exit(IntEnum):
    OK = 0
    SERVER = 1  # nobody answers, a refusal, or an answer that broke off
    USAGE = 2
    INTERRUPTED = 130
    TERMINATED = 143


def run(question: Question, *, as_json: bool) -> Exit:
    """Ask, show, print; what was produced is kept whatever ends it."""
    console = Console()
    view = View()
    if not as_json:
        terminal = console.is_terminal
        view = LiveView(question.text, console) if terminal else PlainView(sys.stdout)
    builder = ReasoningBuilder()
    code, problem = Exit.OK, None
    with _leaving_when_terminated(), view:
        try:
            follow(question, builder, view)
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
        except MementoError as error:
            code = Exit.USAGE if isinstance(error, ConfigError) else Exit.SERVER
            problem = error
    reasoning = builder.reasoning()
    if as_json and (problem is None or _anything(reasoning)):
        print(json.dumps(asdict(reasoning), ensure_ascii=False))
    if problem is not None:
        Console(stderr=True, soft_wrap=True).print(f"{problem}", style="red", markup=False)
    return code


def follow(question: Question, builder: ReasoningBuilder, view: View) -> None:
    """Stream the answer into builder and view. However it ends, both get all that came.

    Raises:
        MementoError, KeyboardInterrupt: after that.
    """
    client = Client(question)
    parser = OpenAIParser(request_config(client.server_options(), question))
    gauge = KvGauge()
    try:
        with closing(client.stream()) as chunks:
            for chunk in chunks:
                with _interrupted_after():
                    events = parser.feed(chunk)
                    gauge.count(parser.prompt_tokens, parser.output_tokens)
                    for event in events:
                        builder.add(event)
                        gauge.add(event)
                        view.add(event, gauge)
    finally:
        for event in parser.finish():
            builder.add(event)
            gauge.add(event)
            view.add(event, gauge)


@contextmanager
def _leaving_when_terminated() -> Iterator[None]:
    """SIGTERM by itself would leave the terminal on its alternate screen."""

    def leave(_number: int, _frame: object) -> None:
        raise SystemExit(Exit.TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupted_after() -> Iterator[None]:
    """Ctrl-C takes effect when the block is done: nothing that came is lost halfway."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def request_config(server: MementoConfig | None, question: Question) -> MementoConfig | None:
    """The server's options with those of the request that decide what is evicted, and when."""
    if server is None:
        return None
    keep = question.memento.get("keep_last_n_blocks")
    return server if keep is None else server.model_copy(update={"keep_last_n_blocks": keep})


def _anything(reasoning: Reasoning) -> bool:
    return bool(reasoning.blocks or reasoning.answer or reasoning.unfinished)
