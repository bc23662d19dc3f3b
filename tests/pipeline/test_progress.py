"""What a run shows while it works."""

from __future__ import annotations

import asyncio
import io

import pytest
from memento_pipeline.run import progress
from memento_pipeline.run.progress import Display, View, duration
from memento_pipeline.store.schema import Spent
from rich.console import Console

NOTHING = Spent(0, 0, 0, 0, 0.0)


def view(**changes: object) -> View:
    made = View(rows=0, earlier=0, ok=0, failed=0, filtered=0, open=0, spent=NOTHING, retries=0)
    return made._replace(**changes)


def test_time_and_money_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    seen = view(spent=Spent(40, 0, 9000, 1000, 2.0))  # paid by an earlier run
    display = Display(100, lambda: seen, Console(file=io.StringIO()))
    now = 160.0
    seen = view(rows=40, earlier=20, ok=38, failed=2, spent=Spent(60, 0, 13000, 2000, 3.0))
    line = display.line(seen)
    # 20 of the 80 that were left took a minute and a dollar.
    assert "left 3m00s" in line
    assert "calls 60 tokens 15,000" in line
    assert "$3.00  of about $6.00" in line
    unknown = Display(None, lambda: seen, Console(file=io.StringIO())).line(seen)
    assert "left" not in unknown
    assert "of about" not in unknown


def test_no_price_shows_no_money() -> None:
    seen = view(rows=1, spent=Spent(3, 3, 0, 0, 0.0))
    assert "$" not in Display(2, lambda: seen, Console(file=io.StringIO())).line(seen)


@pytest.mark.parametrize("terminal", [True, False])
async def test_it_runs_until_cancelled(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.02)
    monkeypatch.setattr(progress, "LIVE_INTERVAL", 0.02)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80)
    shown = Display(5, lambda: view(rows=3, ok=3), console)
    task = asyncio.create_task(shown.run())
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    said = screen.getvalue() if terminal else capsys.readouterr().err
    assert "3/5" in said
    assert "ok 3 filtered 0 failed 0" in said


@pytest.mark.parametrize(("seconds", "text"), [(45, "45s"), (750, "12m30s"), (11100, "3h05m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
