"""A request is in a queue exactly while it has something to do there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memento_sgl.engine.redo import RedoQueues
from memento_sgl.rule.machine import Eviction


class Request:
    """Seven tokens, the last three of them written; hashed by identity, as SGLang's are."""

    is_retracted = False

    def __init__(self) -> None:
        self.origin_input_ids, self.output_ids = [10, 11, 12, 13], [14, 15, 16]
        self.memento = SimpleNamespace(prompt_len=4, length=7)
        self.ended = False

    def finished(self) -> bool:
        return self.ended


def read(queues: RedoQueues, *reqs: Any, overlap: bool = False) -> list[tuple[int, int]]:
    """Index and token of what the next step reads."""
    return [(each.logical, each.token) for each in queues.next_inputs(reqs, overlap=overlap)]


@pytest.mark.parametrize("overlap", [False, True])
def test_only_the_last_step_of_a_replay_counts_for_penalties(overlap: bool) -> None:
    """Under overlap the step behind it is prepared with the same token, and counts it."""
    queues, req = RedoQueues(), Request()
    queues.rewind(req, Eviction(6, 0, 2, 3))
    assert queues.voided == {req: 3}
    counted = []
    for index, token in [(3, 13), (4, 14), (5, 15), (6, 16)]:
        assert read(queues, req, overlap=overlap) == [(index, token)]
        counted.append(req not in queues.reread)
        queues.reread.clear()
    assert counted == [False, False, False, not overlap]
    assert read(queues, req) == []


def test_results_in_flight_and_known_tokens_add_up() -> None:
    queues, req = RedoQueues(), Request()
    queues.make_due(req, in_flight=True)
    queues.rewind(req, Eviction(6, 0, 2, 4))
    ignored = [bool(queues.take_voided([req])) for _ in range(4)]
    assert ignored == [True, True, True, False]


def test_a_result_of_a_retracted_request_is_not_taken_for_a_voided_one() -> None:
    queues, req = RedoQueues(), Request()
    queues.make_due(req, in_flight=True)
    req.is_retracted = True
    assert queues.take_voided([req]) == []
    assert queues.voided == {req: 1}


def test_who_finished_meanwhile_reads_nothing_and_leaves() -> None:
    queues, req, other = RedoQueues(), Request(), Request()
    for each in (req, other):
        queues.rewind(each, Eviction(6, 0, 2, 6))
    req.ended = True
    assert read(queues, req, other) == [(6, 16)]
    assert not queues.holds(req)
    queues.put_off()
    assert queues.holds(other)
    assert not queues.holds(req)


def test_forgotten_is_out_of_every_queue() -> None:
    queues, req = RedoQueues(), Request()
    queues.make_due(req, in_flight=True)
    queues.rewind(req, Eviction(6, 0, 2, 3))
    read(queues, req, overlap=True)
    queues.forget(req)
    assert not queues.holds(req)
    assert not queues.reread
