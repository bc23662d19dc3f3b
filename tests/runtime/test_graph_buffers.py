"""What a captured decode step reads by address is refreshed before each replay.

A CUDA graph reads the tensors that it was captured with. Here the capture is a tape of operations,
run again on the same tensors. The buffers are SGLang's own and filled by SGLang's own code, from
batches whose positions and offsets are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from memento_patches.forward import after_init_new
from sglang.srt.model_executor.cuda_graph_buffer_registry import build_decode_registry
from torch.utils._python_dispatch import TorchDispatchMode

from memento_sgl.engine import runtime
from memento_sgl.request.settings import Settings
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.markers import MarkerIds

SLOTS, CONTEXT, WIDTH, VOCABULARY = 6, 40, 8, 20
CAPTURED = 4  # requests of the captured batch
INPUTS = ("input_ids", "positions", "req_pool_indices", "seq_lens")

Forward = Callable[[Any], Any]


class Tape(TorchDispatchMode):  # type: ignore[misc]
    """Records operations and runs them again, on the tensors of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Write what each operation gave into the tensor that it gave then."""
        for func, args, kwargs, then in self.steps:
            now = func(*args, **kwargs)
            if now.data_ptr() != then.data_ptr():  # not a view, nor in place
                then.copy_(now)


class Graph:
    """A step captured once on static buffers."""

    def __init__(self, forward: Forward, skip: frozenset[str]) -> None:
        self.registry = build_decode_registry(
            device=torch.device("cpu"),
            max_bs=CAPTURED,
            max_num_token=CAPTURED,
            seq_len_fill_value=1,
            cache_loc_dtype=torch.int64,
            share_pool=False,
        )
        self.skip = skip
        static = {name: self.registry.get_slot(name).buffer for name in INPUTS}
        static["seq_lens"].fill_(1)
        self.tape = Tape()
        with self.tape:
            self.output = forward(SimpleNamespace(**static))

    def __call__(self, batch: Any) -> Any:
        size = len(batch.seq_lens)
        self.registry.fill_from(
            batch,
            raw_bs=size,
            padded_bs=CAPTURED,
            raw_num_tokens=size,
            padded_num_tokens=CAPTURED,
            skip_slots=self.skip,
        )
        self.tape.replay()
        return self.output[:size]


class Model:
    """A decode step as models run it: rows are seen, the query stands at its logical position."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rows = torch.zeros(SLOTS, CONTEXT, dtype=torch.int64)
        self.keys = torch.randn(SLOTS * CONTEXT, WIDTH)
        self.embedding = torch.randn(VOCABULARY, WIDTH)

    def forward(self, view: Any) -> Any:
        """Float `[requests, WIDTH]`."""
        angle = view.positions[:, None] / torch.arange(1, WIDTH + 1)
        query = self.embedding[view.input_ids] * angle.cos() + angle.sin()
        keys = self.keys[self.rows[view.req_pool_indices]]
        unseen = torch.arange(CONTEXT) >= view.seq_lens[:, None]
        scores = (query[:, None] * keys).sum(-1).masked_fill(unseen, float("-inf"))
        return (scores.softmax(-1)[..., None] * keys).sum(1)


class Run:
    """Requests that come, grow, evict and go; each step both ways."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = MementoConfig(enable=True, mask_delimiters=False)
        self.state = runtime.Runtime(Settings(config, MarkerIds(1, 2, 3, 4, 5, 6, 7, 8, 9)))
        self.state.positions.offsets = torch.zeros(SLOTS, dtype=torch.int64)
        self.state.positions.evicting = True
        monkeypatch.setattr(runtime, "_current", self.state)
        self.model = Model()
        self.rng = random.Random(0)
        self.length, self.evicted = [0] * SLOTS, [0] * SLOTS

    def wrong_steps(self, graph: Graph, steps: int = 60) -> int:
        """How many of the steps give other than what the model gives without a graph."""
        return sum(not self._same(graph) for _ in range(steps))

    def _same(self, graph: Graph) -> bool:
        for slot in range(SLOTS):
            self._age(slot)
        slots = self.rng.sample(range(SLOTS), self.rng.randint(1, CAPTURED))
        for slot in slots:
            self._grow(slot)
        batch = SimpleNamespace(
            input_ids=torch.tensor([self.rng.randrange(VOCABULARY) for _ in slots]),
            req_pool_indices=torch.tensor(slots),
            seq_lens=(lengths := torch.tensor([self.length[slot] for slot in slots])),
            positions=lengths - 1,
            forward_mode=SimpleNamespace(is_extend=lambda: False),
        )
        after_init_new(batch)
        logical = [self.length[slot] - 1 + self.evicted[slot] for slot in slots]
        exact = SimpleNamespace(**vars(batch) | {"positions": torch.tensor(logical)})
        return torch.equal(graph(batch), self.model.forward(exact))

    def _age(self, slot: int) -> None:
        """Evict two rows, or leave the slot to another request."""
        if self.length[slot] > CONTEXT - 2:
            self.length[slot] = self.evicted[slot] = 0
        elif self.length[slot] > 6 and self.rng.random() < 0.3:
            self.model.rows[slot, 2:-2] = self.model.rows[slot, 4:].clone()
            self.length[slot] -= 2
            self.evicted[slot] += 2
        else:
            return
        self.state.positions.set([slot], [self.evicted[slot]])

    def _grow(self, slot: int) -> None:
        self.model.rows[slot, self.length[slot]] = self.rng.randrange(SLOTS * CONTEXT)
        self.length[slot] += 1


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_positions_and_rows_reach_a_captured_step(run: Run) -> None:
    assert run.wrong_steps(Graph(run.model.forward, frozenset())) == 0
    assert max(run.evicted) > 4


@pytest.mark.parametrize("name", INPUTS)
def test_a_buffer_that_is_not_refreshed_is_found(run: Run, name: str) -> None:
    assert run.wrong_steps(Graph(run.model.forward, frozenset({name}))) > 10


def test_a_tensor_read_by_address_and_replaced_is_found(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets added inside the captured step instead of before it: right as long as they are
    written in place, wrong with a new tensor for each eviction."""

    known = run.state.positions

    def forward(view: Any) -> Any:
        logical = view.positions + known.offsets[view.req_pool_indices]
        return run.model.forward(SimpleNamespace(**vars(view) | {"positions": logical}))

    def replace(slots: list[int], evicted: list[int]) -> None:
        known.offsets = known.offsets.clone()
        known.offsets[torch.tensor(slots)] = torch.tensor(evicted)

    monkeypatch.setattr(f"{__name__}.after_init_new", lambda batch: None)
    graph = Graph(forward, frozenset())
    assert run.wrong_steps(graph) == 0
    monkeypatch.setattr(known, "set", replace)
    assert run.wrong_steps(graph) > 10
