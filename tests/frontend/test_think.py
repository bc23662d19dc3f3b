"""`memento think` with a server that is no Memento server: sensible views and clear errors."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest
from memento_frontend import events as e
from memento_frontend.gauge import KvGauge
from memento_frontend.show import LiveView, gauge_line
from plain_server import KEY, plain_server
from rich.console import Console
from typer.testing import CliRunner, Result

from memento_sgl.cli.app import app
from memento_sgl.demo.server import free_port

THINK = [sys.executable, "-m", "memento_sgl.cli.app", "think"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with plain_server() as address:
        yield address


def think(*arguments: str, question: str = "why", key: str = KEY) -> Result:
    environment = {"MEMENTO_API_KEY": key, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["think", "-", *arguments], input=question, env=environment)


def test_a_server_without_mementos(url: str) -> None:
    done = think("--base-url", url, "--model", "a", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert found["answer"] == "Because of scattering."
    assert found["unfinished"] == "Rayleigh\x1b[31m scattering"
    assert (found["blocks"], found["accounting"], found["finish_reason"]) == ([], None, "stop")
    assert (found["prompt_tokens"], found["output_tokens"]) == (3, 9)

    lines = think("--base-url", url, "--model", "a").stdout.splitlines()
    assert lines == [
        "[thought] Rayleigh\x1b[31m scattering",
        "[answer] Because of scattering.",
        "[end] complete",
        "[KV tokens] this server tells nothing about eviction",
    ]


@pytest.mark.parametrize("gauge", [KvGauge(10, 20, 40), KvGauge()])
@pytest.mark.parametrize(("width", "height"), [(80, 20), (40, 20), (40, 7), (24, 4)])
def test_the_live_picture_fits_and_does_not_steer_the_terminal(
    width: int, height: int, gauge: KvGauge
) -> None:
    terminal = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    view = LiveView("why\x1b[31m?", terminal)
    for number in range(30):
        for event in (
            e.BlockOpened("", number),
            e.BlockText("steps\n" * 50, number),
            e.BlockClosed("", number, 99),
            e.MementoOpened("", number),
            e.MementoText(f"memento{number}\nand \x07more" + " words" * 50, number),
            e.MementoClosed("", number, 40),
            e.BlockEvicted("", number, 99),
            e.BlockOpened("", number + 1),
            e.BlockText("step\n" * 49 + f"at {number}\n", number + 1),
        ):
            view.add(event, gauge)
        drawn = io.StringIO()
        Console(file=drawn, width=width).print(view._now())
        lines = drawn.getvalue().splitlines()
        assert len(lines) <= height
        assert {len(line) for line in lines} == {width}
        assert "KV tokens" in lines[-2] or "~10/40" in lines[-2]
        if height > 4:
            assert f"at {number}" in drawn.getvalue()
        if (width, height) == (80, 20):
            for shown in (f"memento{number}", "99 tokens evicted"):
                assert shown in drawn.getvalue()
            assert ("peak ~20" in lines[-2]) == (gauge.now is not None)
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", drawn.getvalue())
        view.add(e.BlockAbandoned("", number + 1), gauge)


def resize(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def test_a_terminal_that_is_resized_shows_one_picture(url: str) -> None:
    """Each picture stands in the corner of the alternate screen, which no terminal wraps anew."""
    ours, theirs = pty.openpty()
    resize(ours, 100, 30)
    gone = {"COLUMNS", "LINES"}
    process = subprocess.Popen(
        [*THINK, "hang", "--base-url", url, "--model", "a"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={k: v for k, v in os.environ.items() if k not in gone}
        | {"MEMENTO_API_KEY": KEY, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        start = len(shown)
        while text not in shown[start:]:
            shown += os.read(ours, 65536).decode(errors="replace")

    until("tw")
    for columns, rows in ((40, 12), (130, 40), (24, 6)):
        resize(ours, columns, rows)
        until(f"╰{'─' * (columns - 2)}╯")
        until("\x1b[H")
        frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.split("\x1b[H")[-2])
        lines = frame.split("\r\n")
        assert len(lines) == rows
        assert max(map(len, lines)) == columns
        assert frame.count("╭") == frame.count("╰") == 1
    process.terminate()
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 65536):
            shown += piece.decode(errors="replace")
    os.close(ours)
    assert process.wait(60) == 143
    before, _, rest = shown.partition("\x1b[?1049h")
    during, _, after = rest.partition("\x1b[?1049l")
    assert "╭" not in before
    assert "╭" in during
    assert after.count("╭") == 1
    assert "broken off" in after


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
def test_the_gauge_is_one_line_in_every_terminal(width: int) -> None:
    for gauge in (KvGauge(1234, 2345, 4567), KvGauge(1, 1, 1, exact=True), KvGauge(0, 9, 123456)):
        drawn = io.StringIO()
        Console(file=drawn, width=width).print(gauge_line(gauge, width))
        assert drawn.getvalue().count("\n") == 1, drawn.getvalue()
        assert str(gauge.without) in drawn.getvalue()
        assert drawn.getvalue().count("█") + drawn.getvalue().count("░") >= 9


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--base-url", f"http://127.0.0.1:{free_port()}/v1"], 1, "start a server"),
        (["--base-url", "127.0.0.1:30000"], 2, "expected http://HOST:PORT"),
        (["--base-url", "URL"], 2, "give --model, one of: a, b"),
        (["--base-url", "URL", "--model", "c"], 2, "'c' is not served there, but: a, b"),
        (["--base-url", "URL", "--model", "a", "--max-blocks", "3"], 1, "custom_params"),
        (["--base-url", "URL", "--api-key-env", "NOT_SET_ANYWHERE"], 2, "NOT_SET_ANYWHERE"),
        (["--constrain", "gently"], 2, "'gently' is not one of"),
    ],
)
def test_errors_say_what_to_change(url: str, arguments: list[str], code: int, message: str) -> None:
    done = think(*(url if argument == "URL" else argument for argument in arguments))
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr


def test_a_wrong_key_and_an_empty_question(url: str) -> None:
    done = think("--base-url", url, "--model", "a", key="wrong")
    assert done.exit_code == 1
    assert "wrong key" in done.stderr
    assert "--api-key-env" in done.stderr
    empty = think("--base-url", url, question=" \n")
    assert empty.exit_code == 2
    assert "empty" in empty.stderr


@pytest.mark.parametrize(
    ("question", "message"), [("fail", "out of memory"), ("break", "broke the answer off")]
)
def test_what_came_before_the_server_broke_off_is_kept(
    url: str, question: str, message: str
) -> None:
    done = think("--base-url", url, "--model", "a", "--json", question=question)
    assert done.exit_code == 1
    assert message in done.stderr
    found = json.loads(done.stdout)
    assert found["unfinished"].endswith("scattering")
    assert found["finish_reason"] is None


def test_ctrl_c_keeps_what_came(url: str) -> None:
    process = subprocess.Popen(
        [*THINK, "hang", "--base-url", url, "--model", "a"],
        env=os.environ | {"MEMENTO_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = [process.stdout.readline(), process.stdout.readline()]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert seen == ["[block 1] one\n", "[memento 1] 1\n"]
    assert rest.splitlines()[:2] == ["[block 2 (unfinished)] tw", "[end] broken off"]
    assert (process.returncode, errors) == (130, "")
