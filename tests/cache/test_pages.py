"""Page sizes above 1: rows under random interleavings, against the model of `radix_world`, with
prefix caching and without; what is reused."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from radix_world import LETTERS, Request, World, run_alone
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, EvictParams

from memento_sgl.engine.eviction import rows_to_next_point
from memento_sgl.engine.integrity import pages_of


class NoTree:
    """What SGLang makes of its cache where prefixes are not cached: it keeps nothing."""

    weight_version = 0

    disable = True

    def __init__(self, rows: Any, allocator: Any, page: int) -> None:
        self.req_to_token_pool, self.token_to_kv_pool_allocator = rows, allocator
        self.page_size = page

    def evict(self, params: Any) -> None:
        pass

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        pass

    def lock(self, node: Any) -> None:
        pass

    unlock = lock
    free_kv_row = BasePrefixCache.free_kv_row


class PagedWorld(World):
    """No tree."""

    def __init__(self, seed: int, page: int) -> None:
        super().__init__(seed, page)
        self.tree = NoTree(self.rows, self.allocator, page)

    def resume(self) -> None:
        if not self.waiting or not self.rows.free_slots:
            return
        req = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        req.refresh_fill_ids()
        self.rows.alloc([req])
        self.live.append(req)

    def evict(self) -> None:
        """There is no tree to take anything from."""

    def look(self) -> None:
        """There is no tree in which a waiting request could look."""


@pytest.mark.parametrize("page", [2, 4, 5, 16])
@pytest.mark.parametrize("seed", range(2))
def test_random_interleavings(seed: int, page: int) -> None:
    world = PagedWorld(seed, page)
    world.drive(4000, f"seed {seed}, page {page}")
    assert world.moved > 500
    world.end_all()


def test_a_row_that_is_not_laid_out_in_pages_is_found() -> None:
    assert pages_of(torch.tensor([8, 9, 10, 11, 4, 5]), 4).tolist() == [2, 1]
    assert pages_of(torch.tensor([7, 3, 9]), 1).tolist() == [7, 3, 9]
    for row in ([8, 9, 10, 11, 5, 6], [8, 10, 9, 11], [9, 10, 11], [8, 9, 4, 5]):
        with pytest.raises(AssertionError, match="laid out"):
            pages_of(torch.tensor(row), 4)


@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize("tight", [False, True])
def test_random_interleavings_of_what_is_shared(page: int, tight: bool) -> None:
    """Rows hold what their own sequence would have computed; a page has one owner."""
    world = World(page + tight, page, pool=(128 if tight else 448))
    world.drive(4000, f"page {page}")
    assert world.hits > 500
    assert world.moved > 200
    assert world.crossed > 5
    world.end_all()
    world.tree.evict(EvictParams(num_tokens=world.pool))
    assert world.allocator.available_size() == world.pool
    assert not world.tree.root_node.children


def block(*letters: int) -> list[int]:
    return [1, *letters * 6, 2, 3, *letters, 5, 4]


def one_call_per_block() -> list[tuple[list[int], list[int]]]:
    """Each call goes on with all that was said, which ends with a memento."""
    text, calls = [5, 6, 7], []
    for letters in ((5, 6), (6, 7, 5), (7,), (5, 5, 6)):
        calls.append((text, block(*letters)))
        text = text + block(*letters)
    return calls


def turns() -> list[tuple[list[int], list[int]]]:
    text, calls = [5, 6, 7], []
    for letters in ((5, 6), (6, 7, 5), (7,)):
        answer = [*block(*letters), *block(7, *letters), 6, 6, 7]
        calls.append((text, answer))
        text = [*text, *answer, 5, 7, 5]
    return calls


def samples(cut: int) -> list[tuple[list[int], list[int]]]:
    """Four samples of a prompt that ends in a block, in its memento or behind it."""
    prompt = [5, 6, 7, *block(5, 6, 7), *block(6, 7)]
    return [(prompt[: len(prompt) - cut], [*prompt[len(prompt) - cut :], n, 6]) for n in LETTERS]


CALLS = {
    "calls": one_call_per_block(),
    "turns": turns(),
    "in a block": samples(8),
    "in a memento": samples(2),
    "behind": samples(0),
}


def reused(page: int, calls: list[tuple[list[int], list[int]]]) -> list[int]:
    """Logical tokens that each call found in the tree."""
    world, found = World(1, page, pool=448), []
    for number, (prompt, answer) in enumerate(calls):
        req = Request(number, prompt, {}, None)
        world.waiting.append(req)
        world.match(req)
        found.append(req.prefix_len + req.memento.evicted)
        world.waiting.clear()
        run_alone(world, Request(number, prompt, {}, None), answer)
        world.end(world.live[0], is_insert=True)
    return found


@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize("what", CALLS)
def test_larger_pages_reuse_as_much_within_one_page(what: str, page: int) -> None:
    best, found = reused(1, CALLS[what]), reused(page, CALLS[what])
    assert sum(best) > 0
    assert all(one - other < page for one, other in zip(best, found, strict=True)), (best, found)


def test_no_room_for_a_copy_changes_nothing() -> None:
    """Two requests share a block; the memento of one closes while the pool is full."""
    world = World(1, 4, pool=32)
    prompt = [5, 6, 7, 1, 5, 6, 7, 5, 6, 7, 5, 2, 3, 5, 6, 5]
    first, second = (Request(n, [*prompt, n + 5], {}, None) for n in range(2))
    for req in (first, second):
        run_alone(world, req, [])
    assert first.kv.cache_protected_len == second.kv.cache_protected_len == 16
    filler = world.allocator.alloc(world.allocator.available_size())
    row = world.rows.req_to_token[first.kv.req_pool_idx].clone()
    end = first.kv.kv_committed_len
    for token in (6, 4):  # the private page has room for these
        first.output_ids.append(token)
        if not first.memento.observe(first.output_ids):
            assert world.compute(first, len(first.ids) - 1)
    assert not world.tree.evict_shared(first, 4, 11, end + 2, end + 2)
    assert torch.equal(row[:end], world.rows.req_to_token[first.kv.req_pool_idx, :end])
    world.runtime.redo.due.add(first)
    world.evict_now(first)
    assert world.parked == 1
    assert world.waiting == [first]  # it was retracted
    world.allocator.free(filler)
    world.check()
    world.resume()
    while first.prefilling:
        world.prefill(first, 0)
        world.check()
    assert first.memento.applied == 1


def test_a_match_never_ends_at_an_eviction_point_that_is_not_applied() -> None:
    """No prefill could begin there: its first segment would have no rows, and wait for ever."""
    world = World(1, 4, pool=448)
    text = [5, 6, 7, 6, 1, *[5] * 11, 2, 3, 5, 6, 4]
    point = len(text) - 1
    assert point % 4 == 0
    # Another memento behind the same page, evicted; then ours up to its last token, not evicted.
    for number, prompt in enumerate(([*text[: point - 1], 7, 4, 5, 6, 7, 5], text[:point])):
        req = Request(number, prompt, {}, None)
        run_alone(world, req, [])
        world.end(req, is_insert=True)
    req = Request(2, [*text, 7, 7], {}, None)
    world.match(req)
    assert req.prefix_len > 8
    assert rows_to_next_point(req)
    run_alone(world, Request(3, [*text, 7, 7], {}, None), [6])
