"""A pool, the real radix tree and requests, driven at random against a model of what KV is.

The model: the KV of a token is identified by all tokens before it and by the evictions whose point
had been reached when it was computed. Every slot remembers the identity that was written to it; a
row must hold exactly the identities that its own sequence would have produced alone.
"""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import torch
from memento_patches.schedule_batch import before_release_req
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from memento_sgl.cache.paged import PagedRadixCache
from memento_sgl.cache.prefix import PrunableRadixCache
from memento_sgl.engine.eviction import evict_prefix, evict_running, rows_to_next_point
from memento_sgl.engine.integrity import pages_of, tree_slots
from memento_sgl.engine.runtime import Runtime
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.markers import MarkerIds

MARKERS = MarkerIds(1, 2, 3, 4)
LETTERS = (5, 6, 7)
CONFIG = MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"keep_last_n_blocks": 1},
    {"keep_last_n_blocks": -1},
    {"keep_last_block_for_answer": True},
    {"enable": False},
)
POOL = 220
ROW = 160


class Request:
    """What the tree and the evictions touch of SGLang's request."""

    return_logprob = False
    logprob_start_len = -1
    priority = 0

    def __init__(self, rid: int, prompt: list[int], options: dict[str, Any], extra: str | None):
        self.rid = rid
        self.origin_input_ids = array("q", prompt)
        self.output_ids = array("q")
        self.extra_key = extra
        self.cache_salt: str | None = None
        self.options = options
        parsed = RequestOptions.parse(options)
        self.memento = RequestState(self.origin_input_ids, CONFIG, MARKERS, parsed)
        self.full_untruncated_fill_ids = array("q")
        self.forget_row()

    def forget_row(self) -> None:
        self.prefix_len = 0
        self.last_node: Any = None
        self.lock: Any = None
        self.done = False
        self.already_computed = 0
        self.kv = ReqKvInfo()
        self.extend_end = 0
        self.prefilling = True
        self.void_step = False
        self.weights: dict[int, Any] = {}

    @property
    def ids(self) -> list[int]:
        return [*self.origin_input_ids, *self.output_ids]

    skip_radix_cache_insert = False

    def finished(self) -> bool:
        return self.done

    def _compute_max_prefix_len(self, length: int) -> int:
        return max(length - 1, 0)

    def refresh_fill_ids(self) -> None:
        self.full_untruncated_fill_ids = self.memento.row_ids(
            self.full_untruncated_fill_ids, self.origin_input_ids, self.output_ids
        )


class World:
    """A pool, a tree and live requests, driven at random."""

    def __init__(self, seed: int, page: int = 1, pool: int = POOL, **cache: Any) -> None:
        self.rng = random.Random(seed)
        self.page, self.pool = page, pool // page * page
        self.allocator = self.make_allocator()
        self.rows = ReqToTokenPool(16, ROW, "cpu", False)
        params = CacheInitParams(False, self.rows, self.allocator, page, **cache)
        self.tree: Any = (
            PrunableRadixCache(params, MARKERS)
            if page == 1
            else PagedRadixCache(params, MARKERS, self.move)
        )
        self.moved = self.parked = 0
        self.runtime = Runtime(Settings(CONFIG, MARKERS))
        self.runtime.scheduler._scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator, enable_overlap=False, device_module=torch.cpu
        )
        self.runtime.positions.attach(self.rows.req_to_token)
        self.written: dict[int, Any] = {}
        self.live: list[Request] = []
        self.waiting: list[Request] = []
        self.texts: list[list[int]] = [[5, 1, 6, 7, 2, 3, 5, 4, 6]]
        self.hits = self.crossed = self.count = 0

    def make_allocator(self) -> Any:
        pool = SimpleNamespace(move_kv_cache=self.move)
        if self.page == 1:
            return TokenToKVPoolAllocator(self.pool, torch.float32, "cpu", pool, False)
        return PagedTokenToKVPoolAllocator(self.pool, self.page, torch.float32, "cpu", pool, False)

    def move(self, target: Any, source: Any) -> None:
        """What `written` says of a slot moves with its KV."""
        held = [self.written[slot] for slot in source.tolist()]
        self.written.update(zip(target.tolist(), held, strict=True))
        self.moved += len(held)

    # ---- the model

    def identity(self, req: Request, index: int) -> Any:
        ids = req.ids
        reached = tuple(e for e in req.memento.machine.evictions if e.point <= index)
        return tuple(ids[: index + 1]), reached, req.extra_key, req.cache_salt, req.weights[index]

    def computed(self, req: Request, index: int) -> Any:
        """The identity of what is computed now, which sees the row; nobody else has KV of several
        weights."""
        assert req.memento.applied == req.memento.applied_at(index), (req.rid, index)
        now = self.tree.weight_version
        began = req.memento.weight_version
        req.weights[index] = now if began == now else (began, now, req.rid)
        return self.identity(req, index)

    def visible(self, req: Request, rows: int) -> list[int]:
        gone = req.memento.machine.evictions[: req.memento.applied]
        held = [
            i
            for i in range(rows + req.memento.evicted)
            if not any(e.start <= i < e.end for e in gone)
        ]
        assert len(held) == rows
        return held

    def check(self) -> None:
        page = self.page
        owned = [self.allocator.free_pages]
        owned += [pages_of(slots, page) for slots in tree_slots(self.tree)]
        for req in self.live:
            rows = req.kv.kv_committed_len
            row = self.rows.req_to_token[req.kv.req_pool_idx, :rows].to(torch.int64)
            pages_of(row, page)
            owned.append(pages_of(row[req.kv.cache_protected_len :], page))
            right = rows - req.void_step
            for index, slot in zip(self.visible(req, right), row[:right].tolist(), strict=True):
                assert self.written[slot] == self.identity(req, index), (req.rid, index)
        pages = torch.cat(owned)
        assert sorted(pages.tolist()) == list(range(1, self.pool // page + 1))

    # ---- steps

    def drive(self, steps: int, name: str) -> None:
        """That many random actions; `name`: what to do again if one fails."""
        for number in range(steps):
            try:
                self.step()
            except Exception as error:
                raise AssertionError(f"{name}, step {number}") from error

    def end_all(self) -> None:
        """End the live requests, and check what is left."""
        for req in list(self.live):
            self.end(req, is_insert=True)
        self.check()

    def step(self) -> None:
        actions = [(self.start, 3), (self.advance, 12), (self.finish, 1), (self.retract, 1)]
        actions += [(self.evict, 1), (self.resume, 4), (self.flush, 0.05), (self.load, 0.1)]
        actions += [(self.look, 3)]
        kinds, weights = zip(*actions, strict=True)
        self.rng.choices(kinds, weights)[0]()
        self.check()

    def start(self) -> None:
        """A prompt that continues a known text from anywhere, most often near a marker."""
        if len(self.live) + len(self.waiting) >= 6:
            return
        text = self.rng.choice(self.texts)
        near = [i + d for i, t in enumerate(text) if t < 5 for d in (0, 1, 2)]
        cut = self.rng.choice(near or [1]) if self.rng.random() < 0.7 else len(text)
        prompt = text[: max(1, min(cut, len(text)))] + self.some_tokens(self.rng.randint(0, 6))
        extra, salt = (x if self.rng.random() < 0.05 else None for x in ("other", "salt"))
        self.count += 1
        req = Request(self.count, prompt, self.rng.choice(OPTIONS), extra)
        req.cache_salt = salt
        req.priority = self.rng.randint(0, 2)
        req.skip_radix_cache_insert = self.rng.random() < 0.02
        self.waiting.append(req)

    def some_tokens(self, count: int) -> list[int]:
        return [self.rng.choice((1, 2, 3, 4, *LETTERS, *LETTERS)) for _ in range(count)]

    def resume(self) -> None:
        """Match, lock, and begin to prefill a waiting request."""
        if not self.waiting or not self.rows.free_slots:
            return
        req = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        for _ in range(self.rng.randint(1, 2)):  # the policy matches, then the prefill does
            self.match(req)
        assert req.full_untruncated_fill_ids == req.memento.visible(array("q", req.ids))
        assert -req.already_computed == req.memento.evicted
        hit = req.prefix_len
        for index in self.visible(req, hit):
            req.weights[index] = self.tree.weight_version
        self.hits += hit
        self.crossed += req.memento.applied
        req.kv.kv_committed_len = req.kv.kv_allocated_len = hit
        self.rows.alloc([req])
        req.lock = self.tree.lock(req.last_node)
        if hit % self.page and self.allocator.available_size() + self.tree.evictable_size() == 0:
            self.tree.unlock(req.lock)  # admission would not have let it in
            self.rows.free(req)
            req.forget_row()
            req.memento.reset()
            req.full_untruncated_fill_ids = array("q")
            self.waiting.append(req)
            return
        slots = self.tree.prefix_device_indices(req)
        self.rows.write((req.kv.req_pool_idx, slice(0, hit)), slots.to(torch.int32))
        self.live.append(req)

    def match(self, req: Request) -> None:
        req.refresh_fill_ids()
        params = MatchPrefixParams(key=RadixKey(req.full_untruncated_fill_ids), req=req)
        match = self.tree.match_prefix(params)
        req.prefix_len, req.last_node = match.device_prefix_len, match.last_device_node
        req.kv.cache_protected_len = match.cache_protected_len

    def take(self, req: Request, count: int) -> Any:
        wanted = count if self.page == 1 else count + self.page
        if self.allocator.available_size() < wanted:
            self.tree.evict(EvictParams(num_tokens=wanted - self.allocator.available_size()))
        if self.page == 1:
            return self.allocator.alloc(count)
        rows = req.kv.kv_committed_len
        old, new = torch.tensor([rows]), torch.tensor([rows + count])
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        last = row[rows - 1 : rows].to(torch.int64) if rows else torch.tensor([-1])
        if req.prefilling:
            return self.allocator.alloc_extend(old, old, new, new, last, count)
        return self.allocator.alloc_decode(new, new, last)

    def advance(self) -> None:
        """One chunk of prefill, or one decode step."""
        if not self.live:
            return
        req = self.rng.choice(self.live)
        left = len(req.full_untruncated_fill_ids) - req.prefix_len
        if req.prefilling:
            self.prefill(req, left)
        else:
            self.decode(req)

    def prefill(self, req: Request, left: int) -> None:
        if not evict_prefix(self.runtime, req, self.allocator, self.tree):
            self.parked += 1
            return
        left = len(req.full_untruncated_fill_ids) - req.prefix_len
        limit = rows_to_next_point(req)
        count = min(left, self.rng.randint(1, 9), left if limit is None else limit)
        slots = self.take(req, count)
        if slots is None:
            self.end(req, is_insert=False)
            return
        start = req.prefix_len
        end = start + count
        self.rows.write((req.kv.req_pool_idx, slice(start, end)), slots.to(torch.int32))
        req.kv.kv_committed_len = req.kv.kv_allocated_len = end
        for index, slot in zip(self.visible(req, end)[start:], slots.tolist(), strict=True):
            self.written[slot] = self.computed(req, index)
        req.extend_end = end
        if not req.skip_radix_cache_insert:
            self.tree.checkpoint(req, up_to=end)
        req.prefix_len = end
        if count == left:
            req.prefilling = False
            self.sample(req)

    def decode(self, req: Request) -> None:
        if req in self.runtime.redo.due:
            self.evict_now(req)
            if req not in self.live:
                return
        if len(req.ids) >= ROW - 2:
            self.end(req, is_insert=True)
            return
        if not self.compute(req, len(req.ids) - 1):
            self.retract_request(req)
            return
        self.sample(req)

    def evict_now(self, req: Request) -> None:
        rows = req.kv.kv_committed_len
        batch = SimpleNamespace(
            reqs=[req],
            seq_lens=torch.tensor([rows]),
            seq_lens_cpu=torch.tensor([rows]),
            orig_seq_lens=torch.tensor([rows], dtype=torch.int32),
            seq_lens_sum=rows,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
        )
        if evict_running(self.runtime, batch):
            self.parked += 1
            self.retract_request(req)
            return
        req.void_step = False
        self.runtime.redo.replaying.pop(req, None)  # `compute` does it at once
        assert int(batch.seq_lens[0]) == req.kv.kv_committed_len == req.kv.kv_allocated_len

    def compute(self, req: Request, index: int, *, wrong: bool = False) -> bool:
        slots = self.take(req, 1)
        if slots is None:
            return False
        row = req.kv.kv_committed_len
        self.rows.write((req.kv.req_pool_idx, slice(row, row + 1)), slots.to(torch.int32))
        self.written[int(slots[0])] = "computed too early" if wrong else self.computed(req, index)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = row + 1
        return True

    def sample(self, req: Request) -> None:
        """Append a token; if it closes a memento, a step may be in flight that saw the block."""
        state = req.memento.machine.state
        grammar = {1: (2, *LETTERS, *LETTERS), 2: (3,), 3: (4, *LETTERS)}
        well_formed = self.rng.random() < 0.9
        choices = grammar.get(int(state), (1, *LETTERS)) if well_formed else range(1, 8)
        req.output_ids.append(self.rng.choice(list(choices)))
        if req.memento.observe(req.output_ids):
            self.runtime.redo.due.add(req)
            if self.rng.random() < 0.5:
                req.void_step = self.compute(req, len(req.ids) - 1, wrong=True)

    def finish(self) -> None:
        if self.live:
            self.end(self.rng.choice(self.live), is_insert=self.rng.random() < 0.8)

    def end(self, req: Request, *, is_insert: bool) -> None:
        self.release(req, is_insert=is_insert)
        if 2 < len(req.ids) < ROW - 20:
            self.texts = [*self.texts[-7:], req.ids]

    def release(self, req: Request, *, is_insert: bool) -> None:
        rows = req.kv.kv_committed_len
        if is_insert and not req.skip_radix_cache_insert:
            req.done = True
            self.tree.checkpoint(req, up_to=rows)
        self.tree.free_kv_row(req.kv, [(req.kv.cache_protected_len, rows)])
        self.tree.unlock(req.lock)
        req.lock = None
        self.rows.free(req)
        self.live.remove(req)
        self.runtime.forget(req)
        req.forget_row()

    def retract(self) -> None:
        running = [r for r in self.live if not r.prefilling]
        if running:
            self.retract_request(self.rng.choice(running))

    def retract_request(self, req: Request) -> None:
        before_release_req(req=req, tree_cache=self.tree)
        self.release(req, is_insert=False)
        self.waiting.append(req)

    def evict(self) -> None:
        wanted = self.rng.randint(1, 60)
        before = self.allocator.available_size()
        possible = self.tree.evictable_size()
        self.tree.evict(EvictParams(num_tokens=wanted))
        assert self.allocator.available_size() - before >= min(wanted, possible)
        assert possible - self.tree.evictable_size() == self.allocator.available_size() - before

    def look(self) -> None:
        """The policy matches a request that goes on waiting."""
        if self.waiting:
            self.match(self.rng.choice(self.waiting))

    def load(self) -> None:
        """New weights."""
        self.tree.weight_version += 1

    def flush(self) -> None:
        if not self.live:
            self.tree.reset()
            self.allocator.clear()


def run_alone(world: World, req: Request, output: list[int]) -> None:
    """Take a request through prefill and the given output."""
    world.waiting.append(req)
    world.resume()
    assert req in world.live
    while req.prefilling:
        world.prefill(req, len(req.full_untruncated_fill_ids) - req.prefix_len)
        world.check()
    req.output_ids.pop()  # what the world sampled
    parsed = RequestOptions.parse(req.options)
    state = RequestState(req.origin_input_ids, CONFIG, MARKERS, parsed)
    state.restore(req.memento.applied)
    req.memento = state
    world.runtime.redo.due.discard(req)
    for token in output:
        req.output_ids.append(token)
        if req.memento.observe(req.output_ids):
            world.runtime.redo.due.add(req)
            world.evict_now(req)
        assert world.compute(req, len(req.ids) - 1)
        world.check()
