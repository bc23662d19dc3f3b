"""Text of the pages is readable: WCAG's contrast of 4.5 : 1, grey and struck out text included."""

from __future__ import annotations

import re

import pytest

from memento_sgl.templates import template

LEAST = 4.5
TEXT = ("ink", "soft", "gone")
GROUNDS = ("ground", "panel")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["view", "ui", "report"])
def test_contrast(page: str) -> None:
    themes = re.findall(r"--ground: #.*", template(f"{page}.css"))
    assert len(themes) == 3  # light, dark, dark by the system's choice
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", theme))
        for text in TEXT:
            for ground in GROUNDS:
                if text in colours:
                    found = contrast(colours[text], colours[ground])
                    assert found >= LEAST, f"{page}: {text} on {ground}: {found:.2f}"


def test_black_on_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
