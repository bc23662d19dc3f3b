"""Geometry of the report's charts: numbers in, rectangles and labels out; the template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from memento_pipeline.report.tally import Distribution

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 44, 30, 46
_BINS, _LEAST_BINS = 24, 10
_NICE = (1, 2, 2.5, 5, 10)


class Bar(NamedTuple):
    """A rectangle in the units of the drawing; `label` says what it counts."""

    x: float
    y: float
    width: float
    height: float
    label: str
    series: int


class Tick(NamedTuple):
    at: float  # x of a horizontal scale, y of a vertical one
    text: str


class Mark(NamedTuple):
    """A vertical line at a published figure or at this run's mean."""

    x: float
    text: str
    kind: str  # "paper" or "run"
    row: int  # of its label, so that labels do not cover each other
    anchor: str


class Chart(NamedTuple):
    title: str
    unit: str
    series: tuple[str, ...]
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    note: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM
    top: int = TOP


class _Scale(NamedTuple):
    """The horizontal scale: `bins` bins of `step` from `low` on."""

    low: float
    step: float
    bins: int
    whole: bool

    @property
    def unit(self) -> float:
        return (WIDTH - LEFT - 8) / (self.step * self.bins)

    @property
    def shift(self) -> float:
        """A bar of one whole number stands around that number."""
        return 0.5 if self.whole and self.step == 1 else 0.0

    def x(self, value: float) -> float:
        high = self.low + self.step * self.bins
        return LEFT + (min(max(value + self.shift, self.low), high) - self.low) * self.unit

    def bin(self, value: float) -> int:
        return min(max(int((value - self.low) / self.step), 0), self.bins - 1)

    def tick(self, index: int) -> str:
        """What stands below the start of a bin."""
        return _short(self.low + index * self.step, self.low + self.bins * self.step)

    def name(self, index: int) -> str:
        start = self.low + index * self.step
        return _text(start) if self.shift else f"{_text(start)}-{_text(start + self.step)}"


def histogram(
    title: str,
    unit: str,
    series: Sequence[tuple[str, Distribution]],
    *,
    paper: Sequence[tuple[float, str]] = (),
    most: float | None = None,
    whole: bool = True,
) -> Chart | None:
    """Bars of one or two distributions over one scale; None when there are no values.

    Args:
        paper: published figures to mark, with their words.
        most: end of the scale, where it is fixed.
        whole: values are whole numbers, so a bin is at least 1 wide.
    """
    if not any(values.count for _, values in series):
        return None
    scale = _scale([*series, ("", _points(paper))], most, whole)
    counted = [_counted(values, scale) for _, values in series]
    top = _even(max(max(bins) for bins in counted))
    named = len(series) > 1
    bars = [
        _bar(scale, index, times, top, unit, (number, len(series)), name if named else "")
        for number, ((name, _), bins) in enumerate(zip(series, counted, strict=True))
        for index, times in enumerate(bins)
        if times
    ]
    every = max(1, round(scale.bins / 6))
    return Chart(
        title,
        unit,
        tuple(name for name, _ in series),
        bars,
        [
            Tick(scale.x(scale.low + index * scale.step), scale.tick(index))
            for index in range(0, scale.bins + (not scale.shift), every)
        ],
        [Tick(_y(part * top, top), _short(part * top, top)) for part in (0, 0.5, 1)],
        _marks(scale, paper, series),
        "; ".join(_note(name if named else "", values) for name, values in series),
    )


def _points(paper: Sequence[tuple[float, str]]) -> Distribution:
    points = Distribution()
    for value, _ in paper:
        points.add(value)
    return points


def _scale(series: Sequence[tuple[str, Distribution]], most: float | None, whole: bool) -> _Scale:
    high = most or max(value for _, spread in series for value in spread.values) + whole
    high = max(high, _LEAST_BINS) if whole else high
    rough = max(high / _BINS, 1.0 if whole else 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in _NICE if power * nice >= rough * 0.999)
    step = math.ceil(step) if whole else step
    return _Scale(0.0, step, max(1, math.ceil(high / step - 1e-9)), whole)


def _counted(values: Distribution, scale: _Scale) -> list[int]:
    bins = [0] * scale.bins
    for value, times in values.values.items():
        bins[scale.bin(value)] += times
    return bins


def _bar(
    scale: _Scale,
    index: int,
    times: int,
    top: float,
    unit: str,
    place: tuple[int, int],
    name: str,
) -> Bar:
    number, of = place
    width = scale.step * scale.unit / of
    y = _y(times, top)
    return Bar(
        LEFT + index * scale.step * scale.unit + number * width,
        y,
        max(width - 1, 0.5),
        HEIGHT - BOTTOM - y,
        f"{scale.name(index)} {unit}: {times:,} {name}".rstrip(),
        number,
    )


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)


def _marks(
    scale: _Scale,
    paper: Sequence[tuple[float, str]],
    series: Sequence[tuple[str, Distribution]],
) -> list[Mark]:
    wanted = [(value, words, "paper") for value, words in paper]
    for name, values in series:
        if values.mean is not None:
            words = (
                f"mean {name} {_text(values.mean)}"
                if len(series) > 1
                else "mean " + _text(values.mean)
            )
            wanted.append((values.mean, words, "run"))
    return [
        Mark(scale.x(value), words, kind, row, "end" if scale.x(value) > WIDTH * 0.6 else "start")
        for row, (value, words, kind) in enumerate(wanted)
    ]


def _even(value: int) -> float:
    """An even number at or above `value`, so that half of it is whole."""
    return value + value % 2


def _note(name: str, values: Distribution) -> str:
    middle, late = values.quantile(0.5), values.quantile(0.95)
    words = f"{values.count:,} values, median {_text(middle)}, 95 % at most {_text(late)}"
    return f"{name}: {words}" if name else words


def _short(value: float, most: float) -> str:
    """A number on an axis that ends at `most`: 500, 20K, 1.5M."""
    if value < 1000 or most < 10_000:
        return _text(value)
    return f"{value / 1e3:.4g}K" if value < 1e6 else f"{value / 1e6:.4g}M"


def _text(value: float | None) -> str:
    if value is None:
        return "unknown"
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}"
