"""Page sizes above 1: rows under random interleavings, against the model of `radix_world`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from radix_world import POOL, Request, World
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

from memento_sgl.ownership import pages_of


class NoTree:
    """What SGLang makes of its cache where prefixes are not cached: it keeps nothing."""

    weight_version = 0

    def __init__(self, rows: Any, allocator: Any) -> None:
        self.req_to_token_pool, self.token_to_kv_pool_allocator = rows, allocator

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        pass

    def lock(self, node: Any) -> None:
        pass

    unlock = lock
    free_kv_row = BasePrefixCache.free_kv_row


class PagedWorld(World):
    """No tree; slots come in pages, and what `written` says of a slot moves with its KV."""

    def __init__(self, seed: int, page: int) -> None:
        super().__init__(seed)
        self.page = page
        self.pages = POOL // page
        pool = SimpleNamespace(move_kv_cache=self.move)
        self.allocator = PagedTokenToKVPoolAllocator(POOL, page, torch.float32, "cpu", pool, False)
        self.tree = NoTree(self.rows, self.allocator)
        self.runtime._scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator, enable_overlap=False, device_module=torch.cpu
        )
        self.moved = 0

    def move(self, target: Any, source: Any) -> None:
        held = [self.written[slot] for slot in source.tolist()]
        self.written.update(zip(target.tolist(), held, strict=True))
        self.moved += len(held)

    def resume(self) -> None:
        if not self.waiting or not self.rows.free_slots:
            return
        req = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        req.refresh_fill_ids()
        self.rows.alloc([req])
        self.live.append(req)

    def take(self, req: Request, count: int) -> Any:
        rows = req.kv.kv_committed_len
        old, new = torch.tensor([rows]), torch.tensor([rows + count])
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        last = row[rows - 1 : rows].to(torch.int64) if rows else torch.tensor([-1])
        if req.prefilling:
            return self.allocator.alloc_extend(old, old, new, new, last, count)
        return self.allocator.alloc_decode(new, new, last)

    def evict(self) -> None:
        """There is no tree to take anything from."""

    def check(self) -> None:
        owned = [self.allocator.free_pages]
        for req in self.live:
            rows = req.kv.kv_committed_len
            row = self.rows.req_to_token[req.kv.req_pool_idx, :rows].to(torch.int64)
            owned.append(pages_of(row, self.page))
            right = rows - req.void_step
            for index, slot in zip(self.visible(req, right), row[:right].tolist(), strict=True):
                assert self.written[slot] == self.identity(req, index), (req.rid, index)
        assert sorted(torch.cat(owned).tolist()) == list(range(1, self.pages + 1))


@pytest.mark.parametrize("page", [2, 4, 5, 16])
@pytest.mark.parametrize("seed", range(2))
def test_random_interleavings(seed: int, page: int) -> None:
    world = PagedWorld(seed, page)
    for number in range(4000):
        try:
            world.step()
        except Exception as error:
            raise AssertionError(f"seed {seed}, page {page}, step {number}") from error
    assert world.moved > 500
    for req in list(world.live):
        world.end(req, is_insert=True)
    world.check()


def test_a_row_that_is_not_laid_out_in_pages_is_found() -> None:
    assert pages_of(torch.tensor([8, 9, 10, 11, 4, 5]), 4).tolist() == [2, 1]
    assert pages_of(torch.tensor([7, 3, 9]), 1).tolist() == [7, 3, 9]
    for row in ([8, 9, 10, 11, 5, 6], [8, 10, 9, 11], [9, 10, 11], [8, 9, 4, 5]):
        with pytest.raises(AssertionError, match="laid out"):
            pages_of(torch.tensor(row), 4)
