"""The report says what the store holds, and shows any text without running it."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import pytest
from browser import chromium, needs_browser
from memento_pipeline.records import Converted
from memento_pipeline.report.charts import histogram
from memento_pipeline.report.page import MOST_CHARACTERS, Sample, write_report
from memento_pipeline.report.tally import Distribution
from memento_pipeline.run.convert import Exit
from memento_pipeline.run.converted import converted
from memento_pipeline.store.folder import Store
from scenes import FAST, options, run, serving, thought, write_traces
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.errors import ConfigError, StoreError

EVIL = "</script><script>window.owned=1</script><!--<b>\u2028&amp;<|block_end|>"


class Page(HTMLParser):
    """What a browser's parser makes of the page: elements, table cells, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data
        self.words += data

    def line(self, name: str) -> list[str]:
        (found,) = [row for row in self.rows if row and row[0] == name]
        return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    traces = write_traces(folder / "traces.jsonl", 5, 30)
    evil = {
        "id": EVIL,
        "problem": EVIL,
        "cot": f"<think>{thought(9, 20)}\n\n{EVIL}\n\nend</think>{EVIL}",
    }
    short = {"id": "short", "problem": "p", "cot": "too short</think>x"}
    with traces.open("a", encoding="utf-8") as file:
        file.write(json.dumps(evil) + "\n" + json.dumps(short) + "\nno JSON\n")
    ask = FAST.model_copy(update={"price_in": 0.2, "price_out": 0.8})
    with serving() as server:
        run(options(folder / "work", traces, server.url, ask=ask))
    return folder / "work"


def stored(folder: Path) -> list[Converted]:
    with Store(folder, create=False) as store:
        return list(converted(store))


def page(folder: Path, traces: int = 50) -> tuple[Page, str]:
    text = write_report(folder, folder / "report.html", traces).read_text(encoding="utf-8")
    return Page(text), text


def browsed(found: Page) -> list[dict]:
    return json.loads(found.scripts[0])


def test_figures_are_those_of_the_store(work: Path) -> None:
    found, _ = page(work)
    done = stored(work)
    blocks = [block for one in done if one.segmentation for block in one.segmentation.blocks]
    mementos = [memento for one in done for memento in one.mementos]
    assert len(blocks) == len(mementos) > 20
    first = [memento.history[0].judge_score for memento in mementos]
    last = [memento.judge_score for memento in mementos]
    paid = [one for one in done if one.usage.calls]
    assert 0 < sum(score < 8 for score in first) < len(first)

    def share(scores: list[float]) -> str:
        return f"{100 * sum(score >= 8 for score in scores) / len(scores):.1f} %"

    def tokens(one: Converted) -> float:
        spent = one.usage.prompt_tokens + one.usage.completion_tokens
        return spent / sum(one.sentences.tokens)

    cut = [one for one in done if one.segmentation]
    ratio = sum(m.tokens for m in mementos) / sum(b.tokens for b in blocks)
    expected = {
        "sentence ends per trace": (f"{mean(len(d.sentences) - 1 for d in cut):,.1f}", "397"),
        "where a block may end": (
            f"{mean(len(d.sentences.candidates) for d in cut):,.1f}",
            "187",
        ),
        "blocks per trace": (f"{len(blocks) / len(cut):.1f}", "not stated"),
        "tokens per block": (f"{mean(b.tokens for b in blocks):,.0f}", "1,150"),
        "tokens per memento": (f"{mean(m.tokens for m in mementos):,.0f}", "194"),
        "memento tokens / block tokens": (f"{100 * ratio:.1f} %", "15-25 %"),
        "pass the judge at first": (share(first), "28 %"),
        "pass in the end": (share(last), "92 %"),
        "calls per trace": (f"{mean(one.usage.calls for one in paid):.1f}", "51"),
        "tokens paid / thought tokens": (f"{mean(map(tokens, paid)):.1f}x", "14.5x"),
    }
    for name, (here, published) in expected.items():
        assert found.line(name)[1:3] == [here, published], name


def test_status_reasons_and_bill(work: Path) -> None:
    found, _ = page(work)
    with Store(work, create=False) as store:
        counts, spent = store.counts(), store.spent()
    for status, count in counts.items():
        assert found.line(status)[1] == f"{count:,}"
    assert found.line("too short: N of at least N tokens")[1:] == ["filtered", "1"]
    assert any(row[:2][-1:] == ["rejected"] for row in found.rows)
    bill = found.line("all")
    assert bill[2:] == [
        f"{spent.answers:,}",
        f"{spent.prompt_tokens:,}",
        f"{spent.completion_tokens:,}",
        f"${spent.dollars:,.4f}",
    ]
    stages = [row[0] for row in found.rows if len(row) == 6]
    assert {"score", "summarize", "review", "judge"} < set(stages)


def test_browser_holds_every_trace_as_it_is(work: Path) -> None:
    found, _ = page(work)
    shown = {trace["id"]: trace for trace in browsed(found)}
    done = stored(work)
    assert shown.keys() == {one.trace.id for one in done}
    for one in done:
        trace = shown[one.trace.id]
        blocks = one.segmentation.blocks if one.segmentation else ()
        assert [b["text"] for b in trace["blocks"]] == [b.text(one.trace.thought) for b in blocks]
        for block, memento in zip(trace["blocks"], one.mementos, strict=True):
            assert block["memento"]["text"] == memento.text
            scores = [attempt["judge_score"] for attempt in block["memento"]["history"]]
            assert scores == [attempt.judge_score for attempt in memento.history]
        assert (trace["status"], trace["reason"]) == (one.status.value, one.reason)
    assert shown["short"]["thought"] == "too short"


def test_hostile_text_stays_text(work: Path) -> None:
    found, text = page(work)
    assert EVIL in {trace["id"] for trace in browsed(found)}
    assert len(found.scripts) == 2  # the data and our own script
    assert not any("owned" in script for script in found.scripts[1:])
    assert "<" not in found.scripts[0]
    assert "window.owned=1</script>" not in text
    assert not [tag for tag, _ in found.tags if tag in ("img", "iframe", "b", "object")]


def test_hostile_model_and_folder_names(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    traces = write_traces(tmp_path / "t.jsonl", 1)
    with serving() as server:
        made = options(folder, traces, server.url)
        evil = made.endpoints[0].model_copy(update={"model": "<script>alert(2)</script>"})
        run(made.model_copy(update={"endpoints": (evil,)}))
    found, text = page(folder)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert html.escape(folder.name) in text


def test_needs_no_network_and_works_in_both_themes(work: Path) -> None:
    found, text = page(work)
    addresses = [
        value
        for _, attributes in found.tags
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "poster", "srcset")
    ]
    assert addresses == ["data:,"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    assert "prefers-color-scheme: dark" in style
    assert 'data-theme="dark"' in style
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML", found.scripts[1])
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'element\("(\w+)"\)', found.scripts[1])) <= set(ids)
    charts = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(charts) == 6
    assert all(chart["aria-label"] for chart in charts)


def test_unknown_is_never_zero(tmp_path: Path) -> None:
    traces = write_traces(tmp_path / "t.jsonl", 2)
    with serving(usage=False) as server:
        run(options(tmp_path / "w", traces, server.url))
    found, _ = page(tmp_path / "w")
    assert found.line("all")[3:] == ["unknown", "unknown", "unknown"]
    assert found.line("tokens paid / thought tokens")[1] == "unknown"
    assert float(found.line("calls per trace")[1]) > 1
    run(options(tmp_path / "rules", traces, None))
    rules, _ = page(tmp_path / "rules")
    assert rules.line("pass the judge at first")[1] == "not judged"
    assert rules.line("pass in the end")[1] == "not judged"
    assert rules.line("calls per trace")[1] == "0 (no model asked)"
    assert "baseline without a language model" in rules.words


def test_the_page_says_that_it_is_a_sample(work: Path) -> None:
    found, _ = page(work, traces=3)
    total = len(stored(work))
    assert len(browsed(found)) == 3
    assert f"3 of {total} finished traces" in re.sub(r"\s+", " ", found.words)
    everything, _ = page(work)
    assert f"All {total} finished traces" in re.sub(r"\s+", " ", everything.words)
    assert found.line("blocks per trace") == everything.line("blocks per trace")


def test_sample_is_uniform_ordered_and_repeatable() -> None:
    hits = [0] * 20
    for seed in range(2000):
        sample: Sample[int] = Sample(5, seed)
        for item in range(20):
            sample.offer(item)
        assert sample.items == sorted(set(sample.items))
        assert len(sample.items) == 5
        for item in sample.items:
            hits[item] += 1
    assert max(hits) < 600
    assert min(hits) > 400


@needs_browser
def test_unjudged_is_one_word_and_a_search_unfolds(work: Path, tmp_path: Path) -> None:
    run(options(tmp_path / "rules", write_traces(tmp_path / "t.jsonl", 2), None))
    page(tmp_path / "rules")
    with chromium() as browser:
        tab = browser.new_page()
        tab.goto((tmp_path / "rules" / "report.html").as_uri())
        heads = tab.locator(".memento > p").all_text_contents()
        assert len(heads) > 1
        for head in heads:
            assert re.fullmatch(
                r"memento: [\d,]+ tokens, \d+ % of the block, not judged, by rules", head
            )
        block = browsed(Page(tab.content()))[0]["blocks"][-1]["text"].split("\n")[0]
        tab.locator("#search").fill(block.upper())
        opened = [node.evaluate("node => node.open") for node in tab.locator("[data-block]").all()]
        assert opened[-1]
        assert not all(opened)
        page(work)
        tab.goto((work / "report.html").as_uri())
        heads = tab.locator(".memento > p").all_text_contents()
        assert all(re.search(r"of 10, (passes|does not pass), by", head) for head in heads)


def test_labels_of_the_axes_are_short() -> None:
    values = Distribution()
    for value in (1, 1_200_000):
        values.add(value)
    values.values[1] = 25_000
    chart = histogram("t", "tokens", [("", values)])
    assert chart is not None
    assert [tick.text for tick in chart.y_ticks] == ["0", "12.5K", "25K"]
    assert {"0", "1M"} <= {tick.text for tick in chart.x_ticks}
    assert max(len(tick.text) for tick in chart.x_ticks) <= 5


def test_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    long = {"id": "long", "problem": "x" * (MOST_CHARACTERS + 7), "cot": "too short</think>"}
    (tmp_path / "t.jsonl").write_text(json.dumps(long) + "\n")
    run(options(tmp_path / "w", tmp_path / "t.jsonl", None))
    found, _ = page(tmp_path / "w")
    assert browsed(found)[0]["problem"].endswith("x\n[... 7 more characters in the store]")


def test_histograms_lose_no_value() -> None:
    values = Distribution()
    for value in [0, 0, 1, 5, 999, 1000, 1001, 50_000]:
        values.add(value)
    chart = histogram("t", "tokens", [("", values)], paper=[(1150, "paper")])
    assert chart is not None
    assert sum(int(bar.label.rpartition(": ")[2]) for bar in chart.bars) == values.count
    assert all(bar.x + bar.width <= chart.width and bar.y >= 0 for bar in chart.bars)
    labels = [bar.label for bar in chart.bars]
    assert labels == ["0-2,500 tokens: 7", "50,000-52,500 tokens: 1"]
    small = Distribution()
    for value in (1, 1, 11):
        small.add(value)
    chart = histogram("t", "blocks", [("", small)])
    assert chart is not None
    assert [bar.label for bar in chart.bars] == ["1 blocks: 2", "11 blocks: 1"]
    assert chart.bars[0].height == 2 * chart.bars[1].height
    assert histogram("t", "tokens", [("", Distribution())]) is None
    assert (values.quantile(0.5), values.quantile(1.0)) == (5, 50_000)
    assert Distribution().mean is Distribution().share(1) is Distribution().quantile(0.5) is None


def test_command(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(work), "--traces", "2", "--out", str(out)])
    assert (done.exit_code, done.output) == (0, f"wrote {out}\n")
    assert out.exists()
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == Exit.STORE
    with pytest.raises(StoreError):
        write_report(tmp_path, out, 1)
    Store(tmp_path / "empty").close()
    with pytest.raises(ConfigError, match="no traces"):
        write_report(tmp_path / "empty", out, 1)
