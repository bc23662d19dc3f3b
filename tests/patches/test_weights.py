"""Every way to other weights raises the version that names KV."""

from __future__ import annotations

import inspect
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt")

from memento_patches import weights
from memento_patches.ledger import LEDGER
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.sampling.sampling_params import SamplingParams

from memento_sgl.cache.paged import PagedRadixCache
from memento_sgl.cache.prefix import PrunableRadixCache

READS = {
    "begin_weight_update",  # repacks; `end_weight_update` comes before anything is served
    "destroy_weights_update_group",
    "flush_cache_after_weight_update",
    "get_weights_by_name",
    "init_weights_update_group",
    "record_weight_version_after_update",
    "release_memory_occupation",  # nothing is computed before it resumes
    "save_remote_model",
    "save_sharded_model",
}


def wrapped(hook: str) -> set[str]:
    return {seam.target.rpartition(".")[2] for seam in LEDGER if seam.hook == f"weights:{hook}"}


def test_every_method_of_the_manager_stands_in_one_list() -> None:
    methods = {
        name
        for name, _ in inspect.getmembers(SchedulerWeightUpdaterManager, inspect.isfunction)
        if not name.startswith("_")
    }
    writes = wrapped("around_load") | wrapped("around_check")
    assert methods == READS | writes
    assert not READS & writes
    assert wrapped("around_release") == {"release_memory_occupation"}


@pytest.fixture(params=[PrunableRadixCache, PagedRadixCache])
def manager(request: pytest.FixtureRequest) -> Any:
    tree = request.param.__new__(request.param)
    tree._weight_version = tree.generation = 0
    tree._freed = []
    tree.root_node = SimpleNamespace(children={})
    return SimpleNamespace(scheduler=SimpleNamespace(tree_cache=tree))


def test_a_load_that_fails_has_written_too(manager: Any) -> None:
    def fails(*_: Any) -> None:
        raise OSError("half of it")

    weights.around_load(lambda *_: None, manager, None)
    assert manager.scheduler.tree_cache.weight_version == 1
    with pytest.raises(OSError, match="half of it"):
        weights.around_load(fails, manager, None)
    assert manager.scheduler.tree_cache.weight_version == 2


def test_the_checker_writes_by_one_action(manager: Any) -> None:
    for action, version in (("snapshot", 0), ("checksum", 0), ("reset_tensors", 1), ("compare", 1)):
        weights.around_check(lambda *_: None, manager, SimpleNamespace(action=action))
        assert manager.scheduler.tree_cache.weight_version == version


def test_without_a_tree_there_is_nothing_to_name() -> None:
    manager = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=object()))
    assert weights.around_load(lambda *_: 7, manager, None) == 7


def test_an_adapter_loaded_again_has_another_key() -> None:
    """SGLang ends `Req.extra_key`, which is part of every key, with the id of the LoRA adapter. (It
    serves adapters on accelerators only: its plain PyTorch backend pins memory.)"""
    first, again = (LoRARef(lora_name="math", lora_path="adapters/math").lora_id for _ in range(2))
    assert first != again
    keys = {
        Req("1", "", array("q", [5]), SamplingParams(), extra_key="k", lora_id=adapter).extra_key
        for adapter in (first, again, None)
    }
    assert len(keys) == 3
