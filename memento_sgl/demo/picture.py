"""`memento demo`: problems through a real server and the `openai` client, made visible."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import plotext
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from memento_sgl.demo.server import running_server, serve_command
from memento_sgl.demo.task import Problem, held_out
from memento_sgl.observe.recorder import read_records
from memento_sgl.rule.accounting import kv_curve
from memento_sgl.rule.machine import Eviction

PART = re.compile(
    r"<\|block_start\|>(?P<block>.*?)(?:<\|block_end\|>|$)"
    r"(?:<\|summary_start\|>(?P<memento>.*?)(?P<closed><\|summary_end\|>|$))?",
    re.S,
)


@dataclass(frozen=True, slots=True)
class Solved:
    """One problem's streamed answer and the accounting of its final chunk."""

    problem: Problem
    answer: str
    record: dict[str, Any]
    prompt_tokens: int
    output_tokens: int

    @property
    def right(self) -> bool:
        return self.answer == self.problem.answer

    @property
    def curves(self) -> tuple[list[int], list[int]]:
        """KV tokens at each step, with and without eviction."""
        spans = zip(self.record["evicted_spans"], self.record["eviction_points"], strict=True)
        evictions = [Eviction(point, span[0], span[1], point) for span, point in spans]
        length = self.prompt_tokens + self.output_tokens - 1
        return kv_curve(evictions, length), kv_curve([], length)


def run(problems: int, blocks: int, out: Path) -> int:
    """Serve, solve, show; returns the exit code: 0 if every answer is right."""
    console = Console()
    sizes = sorted({max(2, blocks * (i + 1) // problems) for i in range(problems)})
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with ExitStack() as stack:
            with console.status("starting the server on the embedded model (half a minute)"):
                command = serve_command("demo", "--log-level", "warning")
                url = stack.enter_context(running_server(command, log))
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            solved = [_solve(client, p, console) for p in held_out(len(sizes), sizes=sizes)]
    summary = Console(record=True)
    _summary(solved, summary)
    picture = out / "kv.svg"
    summary.save_svg(str(picture), title="memento demo")
    console.print(f"The same picture: {picture}")
    return 0 if all(s.right for s in solved) else 1


def _solve(client: openai.OpenAI, problem: Problem, console: Console) -> Solved:
    """Stream one answer; the open block is shown, closed ones fold into their mementos."""
    thought = answer = ""
    metadata: dict[str, Any] = {}
    usage: Any = None
    stream: Any = client.chat.completions.create(  # type: ignore[call-overload]
        model="demo",
        messages=problem.messages,
        temperature=0,
        max_tokens=3000,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"custom_params": {"memento": {"show_markers": True}}},
    )
    live = Live(console=Console(), transient=True, refresh_per_second=12)
    with live:
        for chunk in stream:
            usage = chunk.usage or usage
            metadata |= (chunk.model_extra or {}).get("metadata") or {}
            for choice in chunk.choices:
                thought += choice.delta.model_extra.get("reasoning_content") or ""
                answer += choice.delta.content or ""
                live.update(_view(problem, thought, answer))
    records = read_records(metadata)
    assert records is not None
    record = records[0]
    assert record is not None
    solved = Solved(problem, answer, record, usage.prompt_tokens, usage.completion_tokens)
    console.print(_view(problem, thought, answer, solved))
    return solved


def _view(problem: Problem, thought: str, answer: str, solved: Solved | None = None) -> Panel:
    parts = list(PART.finditer(thought))
    folded = [p["memento"] for p in parts if p["closed"]]
    lines: list[Any] = [Text("mementos  " + "  ".join(folded), style="green")]
    if parts and not parts[-1]["closed"]:
        lines.append(Text("block     " + parts[-1]["block"][-200:], style="yellow"))
    if answer:
        style = "bold green" if solved is None or solved.right else "bold red"
        lines.append(Text("answer    " + answer, style=style))
    if solved is not None:
        record = solved.record
        lines.append(
            Text(
                f"KV tokens peak {record['peak_kv_tokens']} instead of "
                f"{record['peak_kv_tokens_without']}, evicted {record['evicted_tokens']} in "
                f"{len(record['evicted_spans'])} blocks",
                style="dim",
            )
        )
    return Panel(Group(*lines), title=Text(problem.question[:90]), title_align="left")


def _summary(solved: list[Solved], console: Console) -> None:
    longest = max(solved, key=lambda s: s.output_tokens)
    with_eviction, without = longest.curves
    plotext.clear_figure()
    plotext.plotsize(min(console.width, 100), 18)
    plotext.theme("clear")
    plotext.plot(without, label="without eviction", color="orange+", marker="braille")
    plotext.plot(with_eviction, label="with eviction", color="green+", marker="braille")
    plotext.title("KV tokens held, token by token (longest problem)")
    console.print(Text.from_ansi(plotext.build()))

    table = Table(title="KV tokens of the same requests, with eviction against without")
    for column in ("blocks", "tokens", "peak", "without", "ratio", "area", "without", "ratio"):
        table.add_column(column, justify="right")
    for s in solved:
        r = s.record
        peak, area = r["peak_kv_tokens"], r["kv_auc"]
        table.add_row(
            str(r["blocks"]),
            str(s.prompt_tokens + s.output_tokens),
            str(peak),
            str(r["peak_kv_tokens_without"]),
            f"{peak / r['peak_kv_tokens_without']:.2f}",
            str(area),
            str(r["kv_auc_without"]),
            f"{area / r['kv_auc_without']:.2f}",
        )
    console.print(table)
    right = sum(s.right for s in solved)
    console.print(f"{right} of {len(solved)} answers right")
