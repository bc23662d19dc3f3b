"""The comparison of tensor-parallel ranks that servers in the tests make after every step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist

from memento_sgl.engine.integrity import check_ranks


def scheduler(rows: list[int], applied: int, free: list[int]) -> Any:
    req = SimpleNamespace(
        rid="r",
        kv=SimpleNamespace(req_pool_idx=0, kv_committed_len=len(rows)),
        memento=SimpleNamespace(applied=applied),
    )
    return SimpleNamespace(
        tp_cpu_group=None,
        tree_cache=SimpleNamespace(weight_version=0),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.tensor([rows])),
        token_to_kv_pool_allocator=SimpleNamespace(get_all_free_pages=lambda: torch.tensor(free)),
        running_batch=SimpleNamespace(reqs=[req]),
        last_batch=None,
        cur_batch_for_debug=None,
        chunked_req=None,
    )


def compare(monkeypatch: pytest.MonkeyPatch, *ranks: Any) -> None:
    """Run the check in each rank, all states gathered."""
    states: list[Any] = []

    def gather(into: list[Any], mine: Any, group: Any) -> None:
        states.append(mine)
        into[:] = (states * len(into))[: len(into)]

    monkeypatch.setattr(dist, "get_world_size", lambda group: len(ranks))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for rank in ranks:
        check_ranks(rank)


def test_equal_ranks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, *[scheduler([1, 2, 3], 1, [4, 5])] * 2)


@pytest.mark.parametrize(
    "other",
    [([1, 2, 4], 1, [4, 5]), ([1, 2], 1, [4, 5]), ([1, 2, 3], 0, [4, 5]), ([1, 2, 3], 1, [5, 4])],
    ids=["slots", "length", "evictions", "free"],
)
def test_a_rank_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    with pytest.raises(AssertionError, match="ranks differ"):
        compare(monkeypatch, scheduler([1, 2, 3], 1, [4, 5]), scheduler(*other))
