"""What `memento think` shows: a live picture in a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from memento_frontend import events as e
from memento_frontend.gauge import KvGauge

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could steer the terminal
BAR, LEAST_BAR = 40, 10  # characters


class View:
    """Takes the events of one stream, each with the gauge as it stands after it. Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def add(self, event: e.Event, gauge: KvGauge) -> None:
        pass


class PlainView(View):
    """One line (or paragraph) for each finished part, as soon as it is finished."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._parts = Parts()
        self._anything = False

    def add(self, event: e.Event, gauge: KvGauge) -> None:
        for part in self._parts.add(event):
            self._anything = True
            self._line(part.label, part.text.strip())
        if isinstance(event, e.Done) and self._anything:
            self._line("end", ending(event))
            self._line("KV tokens", kv_line(gauge, event))

    def _line(self, label: str, text: str) -> None:
        print(f"[{label}] {text}", file=self._out, flush=True)


class LiveView(View):
    """The open block streams; once its memento closes it folds into it; the KV gauge moves."""

    def __init__(self, question: str, console: Console) -> None:
        self._title = printable(" ".join(question.split()))[:90]
        self._console = console
        self._parts = Parts()
        self._finished: list[Part] = []
        self._evicted: set[int] = set()
        self._gauge = KvGauge()
        self._done: e.Done | None = None
        # On the alternate screen: elsewhere a terminal that is resized wraps the lines of the last
        # picture anew, and the next one leaves some of them behind.
        self._live = Live(
            console=console,
            screen=console.is_interactive,
            transient=True,
            refresh_per_second=12,
            get_renderable=self._now,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()
        if self._finished and self._done is not None:
            lines = [self._line(part) for part in self._finished if not part.folded]
            end = Text(f"{ending(self._done)}; {kv_line(self._gauge, self._done)}", "dim")
            gauge = gauge_line(self._gauge, self._console.width - 4)
            self._console.print(self._panel([*lines, gauge, end]))

    def add(self, event: e.Event, gauge: KvGauge) -> None:
        self._gauge = gauge
        for part in self._parts.add(event):
            if part.kind is e.MementoText and part.whole:
                block = next(p for p in reversed(self._finished) if p.kind is e.BlockText)
                block.folded, part.tokens = True, block.tokens
            self._finished.append(part)
        if isinstance(event, e.BlockEvicted):
            self._evicted.add(event.number)
        elif isinstance(event, e.Done):
            self._done = event

    def _now(self) -> RenderableType:
        """The picture while the stream runs, no higher than the terminal."""
        rows = max(1, self._console.height - 3)  # without the gauge and the frame
        lines = [self._line(part) for part in self._finished if not part.folded]
        part = self._parts.open
        if part is None and not lines:
            return self._panel([Text("waiting for the server", "dim")])
        written: list[Text] = []
        if part is not None and part.text.strip():
            wrapped = _written(part, tail=4000).wrap(self._console, self._console.width - 4)
            written = list(wrapped)
            if len(written) > (most := max(1, rows // 2)):
                written[: len(written) - most + 1] = [Text(f"{part.label:<10} ...", "dim")]
        for line in lines:
            line.plain, line.no_wrap, line.overflow = (
                line.plain.replace("\n", " "),
                True,
                "ellipsis",
            )
        room = rows - len(written)
        if len(lines) > room:
            earlier = len(lines) - room + 1
            lines[:earlier] = [Text(f"... {earlier} earlier", "dim")] if room else []
        return self._panel([*lines, *written, gauge_line(self._gauge, self._console.width - 4)])

    def _panel(self, lines: list[Text]) -> Panel:
        return Panel(Group(*lines), title=Text(self._title), title_align="left")

    def _line(self, part: Part) -> Text:
        if part.kind is not e.MementoText or not part.whole:
            return _written(part)
        size = "" if part.tokens is None else f"{part.tokens} tokens "
        fate = "evicted" if part.number in self._evicted else "kept"
        return _written(part, note=f"{size}{fate}: ")


@dataclass
class Part:
    """One stretch of a stream: a block, a memento, thought or answer."""

    kind: type[e.Event]  # of its text
    number: int = 0
    text: str = ""
    tokens: int | None = None
    whole: bool = True  # not cut off or abandoned
    folded: bool = False  # a block that its memento stands for

    @property
    def label(self) -> str:
        names = {
            e.BlockText: f"block {self.number + 1}",
            e.MementoText: f"memento {self.number + 1}",
        }
        name = names.get(self.kind, "answer" if self.kind is e.AnswerText else "thought")
        return name if self.whole else f"{name} (unfinished)"


@dataclass
class Parts:
    """Cuts the events into parts."""

    open: Part | None = field(default=None)

    def add(self, event: e.Event) -> list[Part]:
        """Take an event; returns the parts that are finished now, blank ones left out."""
        done: list[Part] = []
        match event:
            case e.BlockText() | e.MementoText() | e.ThoughtText() | e.AnswerText():
                if self.open is None or self.open.kind is not type(event):
                    done += self._close()
                    self.open = Part(type(event))
                self.open.text += event.text
            case e.BlockOpened():
                done += self._close()
                self.open = Part(e.BlockText, event.number)
            case e.MementoOpened():
                done += self._close()
                self.open = Part(e.MementoText, event.number)
            case e.BlockClosed() | e.MementoClosed():
                done += self._close(tokens=event.tokens)
            case e.BlockAbandoned():
                done += self._close(whole=False)
            case e.ThoughtOpened():
                done += self._close()
            case e.ThoughtClosed():
                done += self._close(
                    whole=self.open is None or self.open.kind not in (e.BlockText, e.MementoText)
                )
            case e.Done():
                done += self._close(whole=event.finish_reason == "stop")
        return done

    def _close(self, *, tokens: int | None = None, whole: bool = True) -> list[Part]:
        part, self.open = self.open, None
        if part is None or not (part.text.strip() or part.kind in (e.BlockText, e.MementoText)):
            return []
        part.tokens, part.whole = tokens, whole
        return [part]


def _written(part: Part, *, note: str = "", tail: int | None = None) -> Text:
    styles = {e.BlockText: "yellow", e.MementoText: "green", e.AnswerText: "bold"}
    text = printable(part.text.strip())
    if tail is not None and len(text) > tail:
        text = "..." + text[-tail:]
    return Text.assemble((f"{part.label:<10} {note}", "dim"), (text, styles.get(part.kind, "dim")))


def gauge_line(gauge: KvGauge, width: int) -> Text:
    """KV tokens held now as a bar, the peak as a mark, scaled to what would be held without
    eviction. Where `width` columns are too few for both, the bar comes without words."""
    if gauge.now is None or gauge.peak is None or gauge.without is None:
        words = "KV tokens  not known: the server does not count while it streams"
        return Text(words, "dim", no_wrap=True, overflow="ellipsis")
    about = "" if gauge.exact else "~"
    words = f"{about}{gauge.now} now, peak {about}{gauge.peak}, without eviction {gauge.without}"
    label = "KV tokens  "
    room = width - len(label) - 1
    if room - len(words) < LEAST_BAR:
        words = f"{about}{gauge.now}/{gauge.without}"
    if room - len(words) < LEAST_BAR:
        label, room = "", width - 1
    bar = max(LEAST_BAR, min(BAR, room - len(words)))
    scale = bar / max(1, gauge.without)
    now, peak = round(gauge.now * scale), min(bar - 1, round(gauge.peak * scale))
    cells = ["█" if cell < now else "░" for cell in range(bar)]
    cells[peak] = "▏" if peak >= now else "█"
    return Text.assemble((label, "dim"), ("".join(cells), "cyan"), f" {words}")


def ending(done: e.Done) -> str:
    """Why the stream ended, in words."""
    if done.finish_reason is None:
        return "broken off"
    return {"length": "cut off at the token limit", "stop": "complete"}.get(
        done.finish_reason, done.finish_reason
    )


def kv_line(gauge: KvGauge, done: e.Done) -> str:
    """The accounting in one line."""
    record = done.accounting
    if record is None:
        ended = done.finish_reason is not None
        return "this server tells nothing about eviction" if ended else "no record of eviction"
    peak, without = record["peak_kv_tokens"], record["peak_kv_tokens_without"]
    return (
        f"{len(record['evicted_spans'])} of {record['blocks']} blocks evicted "
        f"({record['evicted_tokens']} tokens), peak {peak} instead of {without} "
        f"({peak / max(1, without):.2f})"
    )


def printable(text: str) -> str:
    """Model output without characters that could steer a terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
