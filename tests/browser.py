"""A real headless browser for tests of pages, where one is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, of text
_CONTRASTS = """([selector, pseudo]) => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  return [...document.querySelectorAll(selector)].map(node => {
    let ground = node, color = [0, 0, 0, 0];
    while (color[3] === 0) { color = parse(getComputedStyle(ground).backgroundColor);
      if (color.length === 3) color.push(1); ground = ground.parentElement; }
    const text = parse(getComputedStyle(node, pseudo).color);
    const pair = [light(text), light(color)].sort((a, b) => b - a);
    return (pair[0] + .05) / (pair[1] + .05);
  });
}"""
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason=f"needs a browser on PATH, one of {', '.join(NAMES)}"
)


@contextmanager
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def contrasts(tab: Any, selector: str, pseudo: str | None = None) -> list[float]:
    """Contrast of the text of each node, or of its pseudo-element, with what lies behind it."""
    found: list[float] = tab.evaluate(_CONTRASTS, [selector, pseudo])
    return found


def search_for(tab: Any, text: str) -> None:
    """Have the browser itself find whole words of a page, hidden or not, as Ctrl-F does: a headless
    one has no search field, but looks for the text of a link in the same way."""
    tab.goto(f"{tab.url.partition('#')[0]}#:~:text={quote(text, safe='').replace('-', '%2D')}")
