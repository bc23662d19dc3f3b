"""The page at /memento in a real headless browser, where one is installed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import LEAST_CONTRAST, chromium, contrasts, needs_browser, search_for
from canned_server import EVIL, KEY, Canned, canned_server, serving
from memento_frontend import events as e
from memento_frontend.text_parser import TextParser
from memento_frontend.ui import Upstream, application
from plain_server import KEY as PLAIN_KEY
from plain_server import plain_server

from memento_sgl.offline.view.page import drawn
from memento_sgl.rule.config import MementoConfig

pytestmark = needs_browser
Opened = Callable[..., Any]
SLOW = 0.004  # seconds per token, so that there is something to see


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def canned() -> Iterator[Canned]:
    with canned_server() as found:
        yield found


@pytest.fixture
def opened(browser: Any, canned: Canned) -> Iterator[Opened]:
    """Opens the page in a new tab; errors of its script and requests elsewhere fail the test."""
    contexts: list[Any] = []
    errors: list[str] = []
    asked: list[str] = []
    with serving(lambda port: application(Upstream(canned.url, None), port)) as own:

        def open_page(
            url: str = own, *, ready: bool = True, tab_of: Any = None, **context: Any
        ) -> Any:
            if tab_of is None:
                context = {"viewport": {"width": 1300, "height": 850}} | context
                contexts.append(browser.new_context(**context))
            tab = contexts[-1].new_page()
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(f"{url}/memento")
            if ready:
                tab.wait_for_selector(".chat textarea")
            return tab

        yield open_page
        for context in contexts:
            context.close()
    assert errors == []
    assert all(
        url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")) for url in asked
    )


def ask(tab: Any, question: str, chat: int = 0, *, wait: bool = True) -> Any:
    node = tab.locator(".chat").nth(chat)
    node.locator("textarea").fill(question)
    node.locator("textarea").press("Enter")
    if wait:
        ended(tab, chat)
    return node


def ended(tab: Any, chat: int = 0) -> None:
    tab.wait_for_function(
        "n => !app.chats[n].running && app.chats[n].turns.length", arg=chat, timeout=60_000
    )
    frame(tab)


def frame(tab: Any) -> None:
    """Wait until what came is drawn."""
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 300)))")


def shared(tab: Any, path: Path) -> str:
    with tab.expect_download() as download:
        tab.locator(".chat").first.locator("text=Share").click()
    download.value.save_as(path)
    return path.read_text(encoding="utf-8")


def test_blocks_come_fold_and_go(opened: Opened, canned: Canned) -> None:
    canned.gap = SLOW
    tab = opened()
    ask(tab, "6 blocks", wait=False)
    tab.wait_for_selector(".unit.gone")
    now = tab.evaluate(
        """() => ({
          open: document.querySelectorAll(".unit.open").length,
          grey: [...document.querySelectorAll(".unit.gone .fold")].map(n => n.ariaExpanded),
          curve: document.querySelectorAll(".chart path.with").length,
          readout: document.querySelector(".readout").textContent,
        })"""
    )
    assert now["open"] <= 1
    assert set(now["grey"]) == {"false"}
    assert now["curve"] == 1
    ended(tab)
    tokens = canned.tokens("6 blocks")
    record = tab.evaluate("app.chats[0].turns[0].record")
    blocks = drawn(canned.trace("6 blocks"), canned.replayer)["blocks"]
    assert tab.locator(".unit.gone").count() == 6
    heads = tab.locator(".unit > .fold .size").all_text_contents()
    assert heads == [f"{block['tokens']} tokens, evicted" for block in blocks]
    assert tab.locator(".memento-box .size").all_text_contents() == ["4 tokens"] * 6
    assert (
        tab.locator(".said").text_content()
        == canned.trace("6 blocks").output.split("</think>\n")[1]
    )
    assert tab.locator(".readout").text_content() == (
        f"KV tokens {record['final_kv_tokens']} now, peak {record['peak_kv_tokens']}, "
        f"{len(tokens.ids) - 1} without eviction"
    )
    assert "6 of 6 blocks evicted" in tab.locator(".state").text_content()


def test_what_streams_is_what_the_record_says(opened: Opened, canned: Canned) -> None:
    tab = opened()
    ask(tab, "7 blocks")
    live, exact = tab.evaluate(
        """() => {
          const story = app.chats[0].turns[0].story, exact = story.data(), record = story.record;
          story.record = null;
          const live = story.data();
          story.record = record;
          return [live, exact];
        }"""
    )
    assert live["evictions"] == exact["evictions"]
    assert live["parts"] == exact["parts"]
    assert live["curve"] == exact["curve"]
    assert live["record"] == exact["record"]


@pytest.mark.parametrize("keep", [0, 2])
def test_a_shared_chat_is_what_view_draws(
    opened: Opened, canned: Canned, tmp_path: Path, keep: int
) -> None:
    tab = opened()
    tab.locator("[name=keep_last_n_blocks]").evaluate(
        "(node, keep) => node.value = keep", str(keep)
    )
    ask(tab, "5 blocks")
    assert canned.bodies[0]["custom_params"]["memento"]["keep_last_n_blocks"] == keep
    path = tmp_path / "shared.html"
    shared(tab, path)
    page = opened_file(tab, path)
    found = json.loads(page.locator("#data").text_content())["requests"][0]
    expected = json.loads(json.dumps(drawn(canned.trace("5 blocks"), canned.replayer, keep)))
    prompt = expected["prompt"]
    for name in ("prompt", "length", "steps", "blocks", "evictions", "curve", "record"):
        assert found[name] == expected[name], name
    assert found["sizes"][prompt:] == expected["sizes"][prompt:]
    assert texts_of(found)[1:] == texts_of(expected)[1:]
    assert page.locator(".unit").count() == 5
    assert page.locator(".part.gone").count() >= 5 - keep
    page.close()


def texts_of(request: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Parts with their text, those of one kind beside each other as one."""
    edges, at = [0], 0
    for size in request["sizes"]:
        at += size
        edges.append(at)
    found: list[tuple[Any, ...]] = []
    for kind, start, end, block, eviction in request["parts"]:
        text = request["text"][edges[start] : edges[end]]
        name = "text" if kind == "marker" and block is None else kind
        if (
            found
            and name == "text"
            and found[-1][0] == "text"
            and found[-1][2:] == (block, eviction)
        ):
            found[-1] = (name, found[-1][1] + text, block, eviction)
        else:
            found.append((name, text, block, eviction))
    return found


def opened_file(tab: Any, path: Path) -> Any:
    page = tab.context.new_page()
    page.goto(path.as_uri())
    return page


def test_the_accounting_of_older_servers_is_read(opened: Opened) -> None:
    tab = opened()
    ask(tab, "old 3 blocks")
    assert "3 of 3 blocks evicted" in tab.locator(".state").text_content()


def test_hostile_text_is_only_text(opened: Opened, canned: Canned, tmp_path: Path) -> None:
    tab = opened()
    scripts = tab.locator("script").count()
    ask(tab, "evil")
    ask(tab, f"{EVIL} 1 blocks")
    tab.keyboard.press("Escape")
    path = tmp_path / "shared.html"
    shared(tab, path)
    for page in (tab, opened_file(tab, path)):
        assert page.evaluate("() => window.owned") is None
        assert page.locator("img, b, iframe").count() == 0
        assert EVIL in page.locator("body").evaluate("node => node.textContent")
    assert tab.locator("script").count() == scripts
    assert tab.locator(".body.block").first.text_content() == EVIL
    # Were markup to slip through all the same, its script would not run.
    tab.evaluate("html => { document.body.insertAdjacentHTML('beforeend', html); }", EVIL)
    frame(tab)
    assert tab.evaluate("() => window.owned") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(opened: Opened, scheme: str) -> None:
    tab = opened(color_scheme=scheme)
    ask(tab, "3 blocks")
    tab.locator(".fold").first.click()
    tab.locator("summary").last.click()
    every = ".gone .block, .soft, .size, .said, .memento-box .body, .state, dt, dd,"
    every += ".readout, summary, .asked, .title, h2, .primary:not(:disabled), label"
    found = contrasts(tab, every)
    found += contrasts(tab, ".gone > .fold[aria-expanded=false]", "::after")
    assert len(found) > 20
    assert min(found) >= LEAST_CONTRAST
    ground = "() => getComputedStyle(document.body).backgroundColor"
    before = tab.evaluate(ground)
    tab.locator("#theme").click()
    assert tab.evaluate(ground) != before
    assert min(contrasts(tab, every)) >= LEAST_CONTRAST


def test_a_phone(opened: Opened) -> None:
    tab = opened(viewport={"width": 390, "height": 844})
    ask(tab, "5 blocks")
    tab.locator(".options summary").click()
    tab.locator("#new").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for chat in range(2):
        tab.locator(".chat textarea").nth(chat).scroll_into_view_if_needed()
        box = tab.locator(".chat").nth(chat).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert tab.locator(".chat .log").nth(chat).bounding_box()["height"] > 90
        send = tab.locator(".chat .primary").nth(chat).bounding_box()
        assert send["y"] + send["height"] <= 844


def test_keys(opened: Opened, canned: Canned) -> None:
    tab = opened()
    focus = "document.activeElement.closest('section')?.ariaLabel"
    tab.keyboard.type("4 blocks")
    tab.keyboard.press("Shift+Enter")
    assert canned.bodies == []
    tab.keyboard.press("Backspace")
    tab.keyboard.press("Enter")
    ended(tab)
    tab.keyboard.press("Escape")
    for key in ("j", "j", "j", "k", "Enter"):
        tab.keyboard.press(key)
    folds = ".fold"
    assert tab.evaluate(focus) == "Block 2"
    expanded = "nodes => nodes.map(node => node.ariaExpanded === 'true')"
    assert tab.eval_on_selector_all(folds, expanded) == [False, True, False, False]
    tab.keyboard.press("e")
    assert tab.eval_on_selector_all(folds, expanded) == [True] * 4
    tab.keyboard.press("e")
    assert tab.eval_on_selector_all(folds, expanded) == [False] * 4
    tab.keyboard.press("n")
    assert tab.locator(".chat").count() == 2
    tab.keyboard.type("never mind j k n")
    assert tab.locator(".chat").count() == 2
    tab.keyboard.press("Escape")
    tab.keyboard.press("h")
    assert tab.evaluate(focus) == "Chat 1"
    tab.keyboard.press("Escape")
    with tab.expect_download() as download:
        tab.keyboard.press("s")
    assert download.value.suggested_filename == "memento-chat-1.html"
    tab.keyboard.press("/")
    tab.keyboard.type("hang")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".unit.open")
    tab.keyboard.press("Escape")
    ended(tab)
    assert tab.locator(".state").first.text_content() == "stopped"
    assert canned.left == ["hang"]


def test_the_browsers_search_unfolds_a_block(opened: Opened, canned: Canned) -> None:
    tab = opened()
    ask(tab, "3 blocks")
    body = tab.locator(".body.block").nth(1)
    assert body.get_attribute("hidden") == "until-found"
    search_for(tab, str(body.text_content()).split("=")[0])
    tab.wait_for_selector(".fold[aria-expanded=true]")
    assert body.get_attribute("hidden") is None
    folds = tab.locator(".fold").all()
    assert [fold.get_attribute("aria-expanded") for fold in folds] == ["false", "true", "false"]


def test_two_hundred_blocks(opened: Opened, canned: Canned) -> None:
    tab = opened()
    ask(tab, "200 blocks")
    assert tab.locator(".unit.gone").count() == 200
    assert tab.evaluate("document.querySelectorAll('*').length") < 200 * 14 + 900
    assert tab.locator(".said").count() == 1
    rest = "log => log.scrollHeight - log.scrollTop - log.clientHeight"
    assert tab.locator(".log").evaluate(rest) <= 2
    curve = tab.evaluate("app.chats[0].turns[0].story.curve()")
    assert curve == [
        list(corner) for corner in drawn(canned.trace("200 blocks"), canned.replayer)["curve"]
    ]


def test_ten_chats_at_once(opened: Opened, canned: Canned) -> None:
    canned.gap = 0.01
    tab = opened()
    for _ in range(9):
        tab.locator("#new").click()
    tab.locator("#all").check()
    ask(tab, "6 blocks", 9, wait=False)
    tab.wait_for_function("() => app.chats.every(chat => chat.node.querySelector('.unit.gone'))")
    assert canned.most == 10
    tab.wait_for_function("() => document.getElementById('running').textContent === '10'")
    assert tab.locator("#without").text_content() == "1,400"
    for chat in range(10):
        ended(tab, chat)
    said = tab.locator(".said").all_text_contents()
    assert said == [canned.trace("6 blocks").output.split("</think>\n")[1]] * 10
    scales = [node.locator("text").all_text_contents() for node in tab.locator(".chart").all()]
    assert all(scale == scales[0] for scale in scales)
    tab.locator(".close").first.click()
    assert tab.locator(".chat").count() == 9


def test_many_tabs(opened: Opened, canned: Canned) -> None:
    first = opened()
    tabs = [first, *(opened(tab_of=first) for _ in range(7))]
    for tab in tabs:
        ask(tab, "hang", wait=False)
    for tab in tabs:
        tab.wait_for_selector(".unit.open", timeout=10_000)
    assert canned.running == 8
    tabs[0].close()
    tabs[1].wait_for_function("() => document.getElementById('running').textContent === '7'")


def test_options_and_follow_ups_reach_the_server(opened: Opened, canned: Canned) -> None:
    tab = opened()
    tab.locator(".options summary").click()
    for name, value in {
        "temperature": "0",
        "max_tokens": "300",
        "system": "Think.",
        "max_blocks": "9",
    }.items():
        tab.locator(f"[name={name}]").fill(value)
    tab.locator("[name=constrain]").select_option("strict")
    ask(tab, "separate 2 blocks")
    ask(tab, "3 blocks")
    first, second = canned.bodies
    assert first["temperature"] == 0
    assert first["max_tokens"] == 300
    assert "top_p" not in first
    memento = {"constrain": "strict", "max_blocks": 9, "show_markers": True}
    assert first["custom_params"] == {"memento": memento}
    assert first["model"] == "canned"
    whole = canned.trace("separate 2 blocks").output
    thought, answer = whole.removeprefix("<think>").split("</think>")
    assert second["messages"] == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "separate 2 blocks"},
        {"role": "assistant", "content": answer, "reasoning_content": thought},
        {"role": "user", "content": "3 blocks"},
    ]
    assert tab.locator(".unit").count() == 5
    tab.locator("#new").click()
    assert tab.locator("[name=temperature]").nth(1).input_value() == "0"


def test_a_stock_server_is_said_and_the_chat_works(opened: Opened) -> None:
    with (
        plain_server() as address,
        serving(lambda port: application(Upstream(address, PLAIN_KEY, "b"), port)) as url,
    ):
        tab = opened(url)
        assert "tells nothing about eviction" in tab.locator("#problem").text_content()
        ask(tab, "Why is the sky blue?")
        assert tab.locator(".said").text_content() == "Because of scattering."
        assert tab.locator(".thought").text_content() == "Rayleigh\x1b[31m scattering"
        assert "this server tells nothing about eviction" in tab.locator(".state").text_content()
        tab.wait_for_selector(".no-load-note:visible")
        ask(tab, "fail")
        assert "out of memory" in tab.locator(".state").text_content()
        ask(tab, "break")
        assert "broke the answer off" in tab.locator(".state").text_content()


def test_a_server_that_wants_a_key(opened: Opened) -> None:
    from test_ui import own_server

    with own_server(KEY) as (url, canned):
        tab = opened(url, ready=False)
        tab.wait_for_selector("#secret:visible")
        tab.locator("#secret").fill("wrong")
        tab.keyboard.press("Enter")
        frame(tab)
        assert tab.locator(".chat").count() == 0
        tab.locator("#secret").fill(KEY)
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".chat textarea")
        ask(tab, "2 blocks")
        assert tab.locator(".unit.gone").count() == 2
        assert len(canned.bodies) == 1


NAMES = {
    e.ThoughtOpened, e.ThoughtText, e.ThoughtClosed, e.AnswerText, e.OtherMarker, e.BlockOpened,
    e.BlockText, e.BlockClosed, e.BlockAbandoned, e.MementoOpened, e.MementoText, e.MementoClosed,
    e.BlockEvicted,
}  # fmt: skip
PIECES = [
    "<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>", "<|im_start|>",
    "<|im_end|>", "assistant", "<think>", "</think>", "x", " ", "\n", "<|",
    "<|block_", "\U0001f600", "<A>", "<R>", "<U>",
]  # fmt: skip
OPTION_SETS: list[dict[str, Any]] = [
    {}, {"keep_last_n_blocks": 1}, {"keep_last_n_blocks": -1}, {"keep_last_block_for_answer": True},
    {"mask_delimiters": True}, {"restart_mode": True}, {"require_assistant_section": False},
    {"compact_on_summary_end": False},
    {"im_start_token": "<A>", "assistant_token": "", "section_start_tokens": "<R>  <R2>",
     "section_end_tokens": "<U>"},
]  # fmt: skip
PARSE = """cases => cases.map(([options, pieces]) => {
  const parser = new Parser(options), out = [];
  for (const [text, reasoning] of pieces) out.push(...parser.feed(text, reasoning));
  return [...out, ...parser.end()];
})"""


def plain(event: e.Event) -> dict[str, Any]:
    found = {"kind": type(event).__name__, "text": event.text}
    return found | {n: getattr(event, n) for n in ("number",) if hasattr(event, n)}


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text events of one kind beside each other as one."""
    found: list[dict[str, Any]] = []
    for event in events:
        event.pop("tokens", None)
        if found and event["kind"].endswith("Text") and found[-1]["kind"] == event["kind"]:
            found[-1]["text"] += event["text"]
        else:
            found.append(dict(event))
    return found


def test_the_script_parses_as_python_does(opened: Opened) -> None:
    rng = random.Random(3)
    well = ["<|block_start|>", "x", "<|block_end|>", "<|summary_start|>", "y", "<|summary_end|>"]
    cases, expected = [], []
    for number in range(1200):
        options = OPTION_SETS[number % len(OPTION_SETS)]
        pieces: list[str] = []
        for _ in range(rng.randint(1, 8)):
            pieces += well if rng.random() < 0.5 else rng.choices(PIECES, k=rng.randint(1, 4))
        channels = rng.random() < 0.3
        turn = rng.randint(0, len(pieces)) if channels else 0
        fed = [(piece, channels and index < turn) for index, piece in enumerate(pieces)]
        settled = {"mask_delimiters": False} | options
        parser = TextParser(MementoConfig(enable=True, **settled))
        events = [
            event for text, reasoning in fed for event in parser.feed(text, reasoning=reasoning)
        ]
        expected.append(joined([plain(event) for event in [*events, *parser.end()]]))
        cases.append(({"enable": True, **settled}, fed))
    tab = opened()
    found = [joined(events) for events in tab.evaluate(PARSE, cases)]
    for case, one, other in zip(cases, found, expected, strict=True):
        assert one == other, case
    seen = {event["kind"] for events in expected for event in events}
    assert seen == {kind.__name__ for kind in NAMES}
