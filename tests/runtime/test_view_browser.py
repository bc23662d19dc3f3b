"""The page of `memento view` in a real headless browser, where one is installed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import LEAST_CONTRAST, chromium, contrasts, needs_browser, search_for

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.task import held_out
from memento_sgl.offline.inputs.formats import Trace, traces_of
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.offline.simulate.replay import Replayer
from memento_sgl.offline.view.page import Page, drawn
from memento_sgl.rule.config import MementoConfig

pytestmark = needs_browser
EVIL = '</script><script>window.owned=1</script><img src=x onerror="window.owned=2"><b>\u2028'
Opened = Callable[..., Any]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def replayer() -> Replayer:
    return Replayer(TextTokenizer(MODEL_DIR), MementoConfig(enable=True, mask_delimiters=False))


@pytest.fixture
def opened(browser: Any, replayer: Replayer, tmp_path: Path) -> Iterator[Opened]:
    """Writes a page of traces and opens it; errors of its scripts fail the test."""
    contexts = []
    errors: list[str] = []
    asked: list[str] = []

    def open_page(*traces: Trace, **context: Any) -> Any:
        page = Page("test", None)
        for trace in traces:
            page.add(drawn(trace, replayer))
        path = tmp_path / f"page{len(contexts)}.html"
        page.write(path)
        contexts.append(browser.new_context(viewport={"width": 1300, "height": 800}, **context))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert all(url.startswith(("file:", "data:")) for url in asked)


def problem(blocks: int, number: int = 0) -> Trace:
    found = held_out(number + 1, sizes=[blocks])[number]
    (trace,) = traces_of({"problem": found.question, "response": found.output}, f"p{number}")
    return trace


def data(tab: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tab.locator("#data").text_content())["requests"][0]
    return found


def grey(tab: Any) -> set[int]:
    """Tokens that the page shows as gone."""
    at = tab.eval_on_selector_all(".part.gone", "nodes => nodes.map(n => +n.dataset.part)")
    parts = data(tab)["parts"]
    return {token for part in at for token in range(parts[part][1], parts[part][2])}


def evicted(tab: Any, moment: int | None = None) -> set[int]:
    """Tokens that the evictions up to a query took."""
    return {
        token
        for point, start, end in data(tab)["evictions"]
        if moment is None or point <= moment
        for token in range(start, end)
    }


def token_box(tab: Any, token: int) -> dict[str, float]:
    """Where the browser drew a token, found without the page's own code."""
    found = data(tab)
    start = sum(found["sizes"][:token])
    part = next(i for i, part in enumerate(found["parts"]) if part[1] <= token < part[2])
    base = sum(found["sizes"][: found["parts"][part][1]])
    box: dict[str, float] = tab.evaluate(
        """([part, from, to]) => {
          const text = document.querySelector(`[data-part="${part}"]`).firstChild;
          const range = document.createRange();
          range.setStart(text, from);
          range.setEnd(text, to);
          const {left, top, width, height} = range.getBoundingClientRect();
          return {left, top, width, height};
        }""",
        [part, start - base, start - base + found["sizes"][token]],
    )
    return box


def frame(tab: Any) -> None:
    """Wait until what the last event asked for is drawn."""
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")


def hover_curve(tab: Any, share: float) -> int:
    """Hover the curve and return the token that the page names."""
    box = tab.locator(".chart").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
    frame(tab)
    return named(tab)


def named(tab: Any) -> int:
    words = tab.locator(".readout").first.text_content()
    return int(words.split(",", 1)[0].removeprefix("token ")) if words else -1


def expanded(tab: Any, kind: str) -> list[bool]:
    return [
        node.get_attribute("aria-expanded") == "true"
        for node in tab.locator(f"[data-fold={kind}]").all()
    ]


def test_blocks_fold_by_click_and_by_keyboard(opened: Opened) -> None:
    tab = opened(problem(4))
    assert expanded(tab, "block") == [False] * 4
    assert expanded(tab, "memento") == [True] * 4
    second = tab.locator("[data-fold=block]").nth(1)
    body = tab.locator(".unit > .body").nth(1)
    folded = body.bounding_box()["height"]
    tab.evaluate("document.querySelectorAll('.unit')[1].style.width = '160px'")
    second.click()
    assert expanded(tab, "block") == [False, True, False, False]
    assert body.bounding_box()["height"] > folded + 30
    second.click()
    assert expanded(tab, "block") == [False] * 4
    tab.mouse.click(5, 5)
    tab.evaluate("document.activeElement.blur()")
    for key in ("j", "j", "j", "k", "Enter"):
        tab.keyboard.press(key)
    assert expanded(tab, "block") == [False, True, False, False]
    tab.keyboard.press("e")
    assert expanded(tab, "block") == [True] * 4
    assert tab.locator("#blocks").text_content() == "fold blocks"
    tab.locator("#blocks").click()
    assert expanded(tab, "block") == [False] * 4
    tab.keyboard.press("m")
    assert expanded(tab, "memento") == [False] * 4


def test_hovering_the_curve_finds_the_token_in_the_text(opened: Opened) -> None:
    tab = opened(problem(3))
    tab.keyboard.press("e")
    for share in (0.3, 0.55, 0.8):
        token = hover_curve(tab, share)
        spot = tab.evaluate(
            "() => { const b = document.querySelector('.spot').getBoundingClientRect();"
            " return {left: b.left, top: b.top}; }"
        )
        box = token_box(tab, token)
        assert (spot["left"], spot["top"]) == pytest.approx((box["left"], box["top"]), abs=1)
        assert tab.locator(".range").is_visible()
        lit = int(tab.locator(".part.lit").get_attribute("data-part"))
        assert data(tab)["parts"][lit][1] <= token < data(tab)["parts"][lit][2]
    assert hover_curve(tab, 0.3) < hover_curve(tab, 0.55) < hover_curve(tab, 0.8)
    tab.mouse.move(3, 3)
    frame(tab)
    assert tab.locator(".part.lit").count() == 0
    assert not tab.locator(".spot").is_visible()
    assert not tab.locator(".range").is_visible()


def test_hovering_the_text_finds_the_query_on_the_curve(opened: Opened) -> None:
    tab = opened(problem(3))
    tab.keyboard.press("e")
    found = data(tab)
    for token in (10, found["prompt"] + 20, found["evictions"][0][0] + 9):
        box = token_box(tab, token)
        for share in (0.2, 0.8):
            tab.mouse.move(box["left"] + box["width"] * share, box["top"] + box["height"] / 2)
            frame(tab)
            assert named(tab) == token
        cursor = tab.locator(".cursor.look").evaluate("n => n.getBoundingClientRect().x + 4")
        x = tab.evaluate(
            "token => { const b = document.querySelector('.chart svg').getBoundingClientRect();"
            " return b.left + View.active.chart.x(token); }",
            token,
        )
        assert cursor == pytest.approx(x, abs=2)


def test_the_curve_says_what_the_accounting_says(opened: Opened) -> None:
    tab = opened(problem(6))
    found = data(tab)
    for query in (0, found["prompt"], found["evictions"][1][0] - 1, found["evictions"][1][0] + 7):
        gone = sum(end - start for point, start, end in found["evictions"] if point <= query)
        held = tab.evaluate("query => View.active.chart.held(query)", query)
        assert held == pytest.approx(query + 1 - gone)


def test_grey_is_what_had_left_at_that_moment(opened: Opened) -> None:
    tab = opened(problem(6))
    assert grey(tab) == evicted(tab)
    assert tab.locator(".part.later").count() == 0
    chart = tab.locator(".chart")
    box = chart.bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + 60)
    moment = int(chart.get_attribute("aria-valuenow"))
    assert 0 < len(evicted(tab, moment)) < len(evicted(tab))
    assert grey(tab) == evicted(tab, moment)
    for key in ("PageDown", "ArrowLeft", "ArrowRight", "PageUp", "Home"):
        tab.keyboard.press(key)
        now = int(chart.get_attribute("aria-valuenow"))
        assert grey(tab) == evicted(tab, now)
    assert now == 0
    tab.keyboard.press("PageDown")
    point = int(chart.get_attribute("aria-valuenow"))
    assert point == data(tab)["evictions"][0][0]
    later = tab.eval_on_selector_all(".part.later", "nodes => nodes.map(n => +n.dataset.part)")
    parts = data(tab)["parts"]
    assert later == [number for number, part in enumerate(parts) if part[1] > point]
    tab.keyboard.press("Escape")
    assert grey(tab) == evicted(tab)


def test_a_click_in_the_text_goes_to_that_token(opened: Opened) -> None:
    tab = opened(problem(3))
    tab.keyboard.press("e")
    token = data(tab)["prompt"] + 25
    box = token_box(tab, token)
    tab.mouse.click(box["left"] + box["width"] / 2, box["top"] + box["height"] / 2)
    assert int(tab.locator(".chart").get_attribute("aria-valuenow")) == token
    assert tab.locator(".cursor.moment").is_visible()
    rest = "() => [...CSS.highlights.get('later')].map(range => range.toString())"
    found = data(tab)
    end = next(part[2] for part in found["parts"] if part[1] <= token < part[2])
    start = sum(found["sizes"][: token + 1])
    assert tab.evaluate(rest) == [found["text"][start : sum(found["sizes"][:end])]]
    tab.keyboard.press("Escape")
    assert tab.evaluate(rest) == []


def test_dark_and_light(opened: Opened) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = opened(problem(2), color_scheme="light")
    dark = opened(problem(2), color_scheme="dark")
    bright, dim = light.evaluate(ground), dark.evaluate(ground)
    assert bright != dim
    light.locator("#theme").click()
    assert light.evaluate(ground) == dim
    light.locator("#theme").click()
    assert light.evaluate(ground) == bright
    dark.locator("#theme").click()
    assert dark.evaluate(ground) == bright


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(opened: Opened, scheme: str) -> None:
    tab = opened(problem(4), color_scheme=scheme)
    tab.locator("[data-fold=block]").first.press("Enter")
    every = ".part, .title, .soft, .cut, .label, .readout, td, th, h1, button"
    assert tab.locator(".part.gone:visible").count() > 0
    assert min(contrasts(tab, every)) >= LEAST_CONTRAST
    previews = contrasts(tab, ".fold.gone", "::after")
    assert len(previews) == 4
    assert min(previews) >= LEAST_CONTRAST


def test_a_phone(opened: Opened) -> None:
    for count in (1, 3):
        tab = opened(*(problem(8, number) for number in range(count)))
        tab.set_viewport_size(PHONE)
        frame(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        room = tab.locator("#requests").bounding_box()
        for node in tab.locator(".request").all():
            assert node.bounding_box()["width"] <= room["width"] <= PHONE["width"]
            assert node.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
            for part in (".chart", ".flow"):
                assert node.locator(part).bounding_box()["width"] <= room["width"]
            assert node.locator(".flow").bounding_box()["height"] > PHONE["height"] / 2
    for button in tab.locator("header button, header input").all():
        box = button.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]


AXES = """([width, most]) => {
  const chart = new Chart({name: "", curve: [[0, 1], [most - 1, most]], parts: []}, null, null);
  Object.assign(chart.node.style, {width: `${width}px`, height: "200px"});
  document.body.append(chart.node);
  chart.draw(most);
  const frame = chart.svg.getBoundingClientRect();
  const labels = [...chart.svg.querySelectorAll("text")].map(node => {
    const box = node.getBoundingClientRect();
    return [node.textContent, box.left - frame.left, box.right - frame.left, box.top, box.bottom];
  });
  chart.node.remove();
  return labels;
}"""


@pytest.mark.parametrize("most", [9, 999, 9_999, 10_000, 32_768, 1_000_000, 1_048_576, 25_000_000])
def test_labels_of_the_axes_are_readable(opened: Opened, most: int) -> None:
    tab = opened(problem(2))
    for width in (280, 352, 600, 1200):
        labels = tab.evaluate(AXES, [width, most])
        assert len(labels) >= 4
        for text, left, right, *_ in labels:
            assert 0 <= left < right <= width, (text, width)
            assert len(text) <= 5
        for number, (text, left, right, top, bottom) in enumerate(labels):
            for other in labels[:number]:
                apart = right + 3 < other[1] or other[2] + 3 < left
                assert apart or bottom < other[3] + 3 or other[4] < top + 3, (text, other[0], width)
    if most == 1_000_000:
        assert {"0", "500K", "1M"} <= {label[0] for label in labels}


def test_the_browsers_search_unfolds_what_it_finds(opened: Opened) -> None:
    tab = opened(problem(6))
    third = held_out(1, sizes=[6])[0].output.split("<|block_start|>")[3].split("=")[0]
    search_for(tab, third)
    tab.wait_for_selector("[data-fold=block][aria-expanded=true]")
    assert expanded(tab, "block") == [False, False, True, False, False, False]


def test_search_goes_through_all_places(opened: Opened) -> None:
    tab = opened(problem(6), problem(6, 1))
    tab.keyboard.press("/")
    tab.keyboard.type("BLOCK_START|>")  # as text, in any case; letters are no commands here
    places = tab.locator("#places")
    assert places.text_content() == "12 found"
    assert expanded(tab, "block") == [False] * 12
    marked = "name => [...CSS.highlights.get(name)].map(range => range.toString())"
    assert tab.evaluate(marked, "found") == ["block_start|>"] * 12
    for number in range(8):
        tab.keyboard.press("Enter")
        assert places.text_content() == f"{number + 1} of 12"
    assert expanded(tab, "block") == [True] * 8 + [False] * 4
    assert tab.evaluate(marked, "here") == ["block_start|>"]
    box = tab.evaluate(
        "() => { const {top, bottom} = [...CSS.highlights.get('here')][0].getBoundingClientRect();"
        " const flow = View.active.flow.getBoundingClientRect();"
        " return [flow.top <= top, bottom <= flow.bottom, View.active.data.name]; }"
    )
    assert box == [True, True, "p1"]
    assert tab.locator(".spot:visible").count() == 1
    for _ in range(8):
        tab.keyboard.press("Shift+Enter")
    assert places.text_content() == "12 of 12"
    tab.locator(".chip").first.click()
    assert places.text_content() == "6 found"
    tab.locator("#search").fill("no such text (")
    assert places.text_content() == "0 found"
    tab.keyboard.press("Escape")
    assert places.text_content() == ""
    assert tab.evaluate(marked, "found") == []
    tab.keyboard.press("e")
    assert expanded(tab, "block") == [True] * 6


def test_several_requests_side_by_side(opened: Opened) -> None:
    tab = opened(*(problem(size, number) for number, size in enumerate((2, 3, 8, 2))))
    assert tab.locator(".request").count() == 3
    lefts = [node.bounding_box()["x"] for node in tab.locator(".request").all()]
    assert lefts == sorted(set(lefts))
    scales = [node.locator("text").all_text_contents() for node in tab.locator(".chart").all()]
    assert len(scales[0]) > 4
    assert scales[0] == scales[1] == scales[2]
    tab.keyboard.press("l")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").endswith(
        "p1, by token"
    )
    tab.locator(".chip").nth(3).click()
    assert tab.locator(".request").count() == 4
    for number in (0, 1, 2):
        tab.locator(".chip").nth(number).click()
    assert tab.locator(".request").count() == 1
    tab.locator(".chip").nth(3).click()  # the last one stays
    assert tab.locator(".request").count() == 1
    assert tab.locator("h2").text_content() == "p3"


def long_trace(tokens: int, blocks: int) -> Trace:
    rng = random.Random(1)
    words = ["so", "the", "sum", "of", "x", "and", "y", "is", "one", "more", "than", "two"]
    size = tokens // blocks - 200
    text = "<think>\n"
    for _ in range(blocks):
        block = " ".join(rng.choices(words, k=size))[:size]
        memento = " ".join(rng.choices(words, k=160))[:160]
        text += f"<|block_start|>{block}<|block_end|>\n"
        text += f"<|summary_start|>{memento}<|summary_end|>\n"
    return Trace("long", "", text + "</think>\nDone.")


COUNT = """async ([share, moves]) => {
  const chart = document.querySelector(".chart"), box = chart.getBoundingClientRect();
  let changes = 0, nodes = 0;
  const watch = new MutationObserver(list => {
    changes += list.length;
    for (const one of list) nodes += [...one.addedNodes].filter(n => n.nodeType === 1).length;
  });
  watch.observe(document.body, {subtree: true, childList: true, attributes: true});
  for (let i = 0; i < moves; i++) {
    const x = box.left + box.width * (share + i / moves / 3);
    chart.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 30}));
    await new Promise(requestAnimationFrame);
  }
  await new Promise(requestAnimationFrame);
  watch.disconnect();
  return [changes, nodes];
}"""


def test_32k_tokens_cost_no_more_than_their_blocks(opened: Opened) -> None:
    short, tab = opened(long_trace(16_000, 30)), opened(long_trace(34_000, 30))
    assert data(tab)["length"] > 32_000
    every = "() => document.querySelectorAll('*').length"
    size = tab.evaluate(every)
    assert size == pytest.approx(short.evaluate(every), abs=20)
    assert size < 1200
    tab.keyboard.press("e")
    moves = 40
    changes, added = tab.evaluate(COUNT, [0.3, moves])
    assert 0 < changes <= 20 * moves
    assert added == 0
    # Many events in one frame are one look.
    together = COUNT.replace("    await new Promise(requestAnimationFrame);\n  }", "  }")
    changes, _ = tab.evaluate(together, [0.3, 500])
    assert 0 < changes <= 20
    tab.mouse.move(3, 3)
    tab.locator(".chart").focus()
    tab.keyboard.press("Home")
    tab.keyboard.press("PageDown")
    assert grey(tab) == evicted(tab, data(tab)["evictions"][0][0])
    assert tab.evaluate(every) == size


def test_hostile_text_is_only_text(opened: Opened) -> None:
    text = f"<|block_start|>{EVIL}<|block_end|><|summary_start|>{EVIL}<|summary_end|>x"
    tab = opened(Trace(EVIL, EVIL, text))
    assert tab.evaluate("() => window.owned") is None
    assert tab.locator("img, b, iframe").count() == 0
    assert tab.locator("script").count() == 5
    shown = "".join(tab.locator(".part").all_text_contents())
    assert shown == EVIL + text
    assert EVIL in tab.locator(".request").get_attribute("aria-label")
