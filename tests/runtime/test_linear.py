"""What a prompt of many finished blocks costs: operations are counted, nothing is timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sglang")

from radix_world import Request, World, run_alone

from benchmarks.bookkeeping import measure
from memento_sgl.admission.pacing import SEGMENTS, Pacing


def operations(work: Callable[[], object]) -> int:
    """Bytecodes of this project's runtime that `work` executes."""
    count = 0

    def inside(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return inside

    def entered(frame: FrameType, _event: str, _argument: Any) -> Any:
        if "/memento_sgl/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_prompt_costs_what_its_blocks_cost() -> None:
    measure(2)
    few, many = (operations(lambda n=n: measure(n)) for n in (25, 200))  # type: ignore[misc]
    assert many < 8.5 * few


def test_a_waiting_request_is_matched_once_while_the_tree_stays() -> None:
    """Every eviction of the running batch looks at the head of the queue again."""
    world = World(1)
    text = [7, 1, 5, 6, 7, 5, 2, 3, 5, 4, 6, 6]
    run_alone(world, Request(1, text, {}, None), [1, 5, 6, 2, 3, 5])
    waiting = Request(2, [*text, 5, 5, 5], {}, None)
    world.waiting.append(waiting)
    walked = []
    walk = world.tree._walk
    world.tree._walk = lambda *arguments: walked.append(1) or walk(*arguments)  # type: ignore
    for _ in range(3):
        world.match(waiting)
    runner = world.live[0]
    runner.output_ids.append(4)
    assert runner.memento.observe(runner.output_ids)
    world.runtime.redo.due.add(runner)
    world.evict_now(runner)  # its own rows: the tree has nothing of that block
    world.match(waiting)
    assert len(walked) == 1
    world.end(runner, is_insert=True)
    world.match(waiting)
    assert len(walked) == 2


def test_decode_steps_run_between_segments() -> None:
    pacing = Pacing()

    def steps(count: int, *, more: bool = True, others: bool = True) -> list[bool]:
        return [pacing.decode_next(more_segments=more, others=others) for _ in range(count)]

    assert steps(2 * (SEGMENTS + 1)) == ([False] * SEGMENTS + [True]) * 2
    assert not any(steps(30, others=False))
    assert not any(steps(30, more=False))
    assert steps(SEGMENTS + 1)[-1]
