"""No step makes the scheduler wait for the device: nothing is read back, and what goes there goes
from pinned memory. On fake tensors of a GPU, so that no GPU is needed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from memento_patches.forward import after_init_new, around_sample
from memento_patches.penalties import COUNTS, around_cumulate
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memento_sgl.engine import runtime, staging
from memento_sgl.engine.eviction import evict_running
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9)
#        0  1  2  3  4  5  6  7   logical
TEXT = [9, 1, 20, 2, 3, 21, 4, 22]
DEVICE, VOCABULARY = "cuda", 30


class Waits(TorchDispatchMode):  # type: ignore[misc]
    """Notes operations that a GPU would make the caller wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Any] = []
        self.found: list[str] = []
        self.copies = 0

    def pin(self, host: Any) -> Any:
        self.pinned.append(pinned := host.clone())
        return pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.device.type == DEVICE}
        copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        target = torch.device(given.get("device") or tensors[0].device) if tensors else None
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(f"{func}: a value is read back")
        elif copy and target is not None and devices | {target.type} == {"cpu", DEVICE}:
            self.copies += 1
            ours = any(tensors[-1] is host for host in self.pinned)
            if not (ours and given.get("non_blocking") and target.type == DEVICE):
                self.found.append(f"{func}: a copy that is waited for")
        elif len(devices) > 1 and func.namespace == "aten":
            self.found.append(f"{func}: host and device tensors together")
        return func(*args, **given)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits = Waits()
    monkeypatch.setattr(staging, "_pins", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda host: waits.pin(host))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield waits


class Lengths(list[int]):
    """The host's mirror of the lengths, which may be read."""

    def __sub__(self, less: Any) -> Lengths:
        return self


class Request:
    is_retracted, inflight_middle_chunks, cached_tokens = False, 0, 0
    extend_end = len(TEXT)

    def __init__(self, slot: int, **options: Any) -> None:
        self.origin_input_ids, self.output_ids = array("q", TEXT[:1]), array("q", TEXT[1:])
        config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
        self.memento = RequestState(TEXT[:1], config, MARKERS, RequestOptions.parse(options))
        self.memento.observe(self.output_ids)
        self.kv = SimpleNamespace(
            req_pool_idx=slot, cache_protected_len=0, kv_committed_len=8, kv_allocated_len=8
        )

    def finished(self) -> bool:
        return False


def make_batch(page: int) -> Any:
    """One constrained and one plain request, each with an eviction that is due."""
    kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
    sizes = (64,) if page == 1 else (64, page)
    lengths = torch.full((2,), 8, device=DEVICE)
    counts = {k: torch.zeros(2, VOCABULARY, device=DEVICE) for k in COUNTS}
    return SimpleNamespace(
        reqs=[Request(1, constrain="strict"), Request(2)],
        device=DEVICE,
        seq_lens=lengths,
        seq_lens_cpu=Lengths([8, 8]),
        orig_seq_lens=lengths.to(torch.int32),
        req_to_token_pool=SimpleNamespace(
            req_to_token=torch.zeros(4, 64, dtype=torch.int32, device=DEVICE)
        ),
        token_to_kv_pool_allocator=kind(*sizes, torch.float32, DEVICE, None, False),
        tree_cache=SimpleNamespace(page_size=page),
        sampling_info=SimpleNamespace(
            penalizer_orchestrator=SimpleNamespace(
                penalizers={
                    k: SimpleNamespace(is_prepared=lambda: True, **{COUNTS[k]: count})
                    for k, count in counts.items()
                }
            )
        ),
    )


@pytest.mark.parametrize("page", [1, 4])
def test_no_part_of_a_step_waits(waits: Waits, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
    state = runtime.Runtime(Settings(config, MARKERS))
    monkeypatch.setattr(runtime, "_current", state)
    monkeypatch.setattr(state.scheduler, "move_kv", lambda target, source: None)
    state.scheduler._scheduler = SimpleNamespace(
        future_map=SimpleNamespace(
            output_tokens_buf=torch.zeros(4, dtype=torch.int64, device=DEVICE)
        ),
        enable_overlap=False,
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
        req_to_token_pool=(batch := make_batch(page)).req_to_token_pool,
    )
    state.positions.attach(state.scheduler.table)
    state.positions.evicting = True
    slots = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    logits = SimpleNamespace(next_token_logits=torch.zeros(2, VOCABULARY, device=DEVICE))
    forward = SimpleNamespace(
        positions=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        req_pool_indices=slots,
        forward_mode=SimpleNamespace(is_extend=lambda: False),
    )
    state.emission.place(batch.reqs)  # made once
    assert state.emission.automaton is not None
    with waits:
        state.place(batch)
        state.redo.due.update(batch.reqs)
        evict_running(state, batch)
        assert len(state.redo.replaying) == 2
        state.feed_replays(batch)
        state.redo.reread.update(batch.reqs)
        around_cumulate(lambda batch: None, batch)
        after_init_new(forward)
        around_sample(lambda *args: slots, None, logits, forward)
    assert waits.found == []
    assert waits.copies >= 8


def test_what_would_wait_is_found(waits: Waits) -> None:
    table = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    with waits:
        torch.tensor([1, 2], device=DEVICE)
        torch.as_tensor([1, 2]).to(DEVICE, non_blocking=True)
        table[[0, 1]] += 1
        table[torch.tensor([0, 1])]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            table[0, 0].item()
    assert len(waits.found) >= 5
