"""The prunable radix tree under random interleavings, and one case after the other."""

from __future__ import annotations

import random
from array import array
from itertools import permutations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from radix_world import LETTERS, POOL, Request, World, run_alone
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from memento_sgl.cache.key import LONGEST, encode_point, is_block_start
from memento_sgl.engine.integrity import tree_slots
from memento_sgl.errors import ConfigError
from memento_sgl.rule.machine import Eviction
from memento_sgl.serve.refuse import refuse_context


@pytest.mark.parametrize("seed", range(6))
def test_random_interleavings(seed: int) -> None:
    world = World(seed)
    world.drive(6000, f"seed {seed}")
    assert world.hits > 1000
    assert world.crossed > 20
    assert world.tree.pruned_tokens > 100
    assert world.tree.revived_tokens > 10
    world.end_all()
    world.tree.evict(EvictParams(num_tokens=POOL))
    assert world.allocator.available_size() == POOL
    assert not world.tree.root_node.children
    assert world.tree.evictable_size() == world.tree.protected_size() == 0


def test_a_tree_of_finished_blocks_holds_no_slots_for_them() -> None:
    """100 long requests that share a prompt: slots = surviving tokens of distinct prefixes."""
    world = World(1)
    world.allocator = TokenToKVPoolAllocator(20000, torch.float32, "cpu", None, False)
    world.tree.token_to_kv_pool_allocator = world.allocator
    world.check = lambda: None  # type: ignore[method-assign]
    prompt = [5, 6, 7, 5, 5, 6]
    surviving = set()
    for number in range(100):
        req = Request(number, prompt, {}, None)
        draw = random.Random(number % 60)
        output = []
        for _ in range(4):
            block = draw.choices(LETTERS, k=draw.randint(3, 15))
            output += [1, *block, 2, 3, *draw.choices(LETTERS, k=2), 4]
        run_alone(world, req, output)
        for index in world.visible(req, req.kv.kv_committed_len):
            surviving.add(world.identity(req, index))
        assert req.memento.applied == 4
        world.end(req, is_insert=True)
    slots = sum(map(len, tree_slots(world.tree)))
    assert slots == len(surviving)
    assert world.tree.evictable_size() == slots == 20000 - world.allocator.available_size()


def test_a_block_that_another_request_reads_goes_with_its_last_lock() -> None:
    world = World(2)
    block = [1, 5, 6, 7, 5, 2]
    reader = Request(1, [7, *block[:4]], {}, None)
    run_alone(world, reader, [])
    writer = Request(2, [7, *block], {}, None)
    run_alone(world, writer, [3, 5, 4])
    assert writer.memento.applied == 1
    pruned = world.tree.pruned_tokens
    assert world.tree.protected_size() >= 5
    world.end(writer, is_insert=True)
    assert world.tree.pruned_tokens < pruned + 4
    world.end(reader, is_insert=True)
    world.check()
    live = sum(map(len, tree_slots(world.tree)))
    assert live == len([7, 1]) + len([2, 3, 5, 4])
    assert world.tree.pruned_tokens == 4


def test_a_retracted_request_resumes_from_what_it_left() -> None:
    world = World(3)
    req = Request(1, [5, 6, 7], {}, None)
    run_alone(world, req, [1, 5, 6, 2, 3, 7, 4, 1, 5, 6])
    rows = req.kv.kv_committed_len
    world.retract_request(req)
    world.resume()
    assert req.prefix_len == rows - 1  # one token is always left to compute
    assert req.memento.applied == 1
    world.check()


FINISHED = [7, 1, 5, 6, 7, 5, 2, 3, 5, 4]  # index 9 evicts [2, 6)


def live_slots(world: World) -> int:
    return sum(map(len, tree_slots(world.tree)))


def test_a_block_that_the_last_token_finishes_is_pruned_too() -> None:
    world = World(7)
    req = Request(1, FINISHED[:-1], {}, None)
    run_alone(world, req, [])
    req.output_ids.append(FINISHED[-1])  # the engine ends a request before anyone has observed it
    world.end(req, is_insert=True)
    world.check()
    assert world.tree.pruned_tokens == 4
    assert live_slots(world) == len(FINISHED) - 1 - 4


def test_a_prompt_that_ends_with_a_memento_reuses_all_of_it() -> None:
    world = World(8)
    run_alone(world, Request(1, [*FINISHED, 6], {}, None), [])
    again = Request(2, FINISHED, {}, None)
    world.waiting.append(again)
    world.resume()
    assert again.memento.applied == 1
    assert again.prefix_len == len(FINISHED) - 1 - 4


def test_a_split_of_a_block_that_is_to_go_leaves_nothing_behind() -> None:
    world = World(9)
    reader, writer = Request(1, FINISHED[:5], {}, None), Request(2, FINISHED[:7], {}, None)
    run_alone(world, reader, [])
    run_alone(world, writer, FINISHED[7:])
    world.end(writer, is_insert=True)
    world.waiting.append(Request(3, [*FINISHED[:3], 5], {}, None))
    world.resume()  # its match ends inside the block
    world.end(world.live[-1], is_insert=False)
    world.end(reader, is_insert=True)
    world.check()
    assert world.tree.pruned_tokens == 4
    assert live_slots(world) == len(FINISHED) - 4


def test_a_revived_block_goes_when_a_request_passes_it() -> None:
    world = World(10)
    run_alone(world, Request(1, FINISHED[:7], {}, None), FINISHED[7:])
    world.end(world.live[0], is_insert=True)
    run_alone(world, Request(2, FINISHED[:8], {}, None), [])
    world.end(world.live[0], is_insert=True)
    assert world.tree.revived_tokens == 4
    assert live_slots(world) == len(FINISHED)
    run_alone(world, Request(3, [*FINISHED, 6], {}, None), [])
    assert live_slots(world) == len(FINISHED) - 4 + 1


def test_keys_tell_evictions_apart() -> None:
    far = LONGEST - 1
    evictions = [
        Eviction(point, start, end, resume)
        for point, start, end, resume in (
            (9, 2, 6, 9), (9, 1, 6, 9), (9, 2, 7, 9), (9, 2, 6, 7), (far, 0, 1, far), (far, 0, 1, 0)
        )
    ]  # fmt: skip
    keys = {encode_point(e, kind): kind for e in evictions for kind in (False, True)}
    assert len(keys) == 2 * len(evictions)
    assert all(-(2**63) <= key < 0 and is_block_start(key) is kind for key, kind in keys.items())
    moved = Eviction(109, 102, 106, 109)
    assert encode_point(moved, True) == encode_point(evictions[0], True)


def test_a_shared_prefix_takes_the_highest_priority() -> None:
    world = World(11)
    for number, priority in enumerate((1, 5, 2)):
        req = Request(number, [5, 6, 7, 5, 5 + number], {}, None)
        req.priority = priority
        run_alone(world, req, [])
    (stem,) = world.tree.root_node.children.values()
    (shared,) = stem.children.values()
    assert len(shared.key) == 4
    assert shared.priority == 5
    assert sorted(node.priority for node in shared.children.values()) == [1, 2, 5]


def test_a_running_request_frees_its_block_at_once() -> None:
    """Also where the block came with the prompt, so that the tree owns its slots."""
    world = World(12)
    run_alone(world, Request(1, FINISHED[:7], {}, None), FINISHED[7:])
    assert world.live
    assert world.tree.pruned_tokens == 4
    assert POOL - world.allocator.available_size() == len(FINISHED) - 4


def test_the_least_recently_used_goes_first() -> None:
    world = World(13)
    old, new = [5, 6, 7, 5, 5], [7, 6, 5, 5, 5]
    for number, prompt in enumerate((old, new, old)):
        world.waiting.append(req := Request(number, prompt, {}, None))
        world.resume()
        if number < 2:
            world.prefill(req, len(prompt))
        world.end(req, is_insert=number < 2)
    world.tree.evict(EvictParams(num_tokens=1))
    (stem,) = world.tree.root_node.children.values()
    (left,) = stem.children.values()
    assert left.key[0] == old[0]


def test_a_reset_forgets_revived_blocks() -> None:
    world = World(14)
    for prompt in (FINISHED, FINISHED[:8]):
        run_alone(world, Request(1, prompt, {}, None), [])
        world.end(world.live[0], is_insert=True)
    assert world.tree.revived_tokens == 4
    world.flush()
    world.tree.evict(EvictParams(num_tokens=1))
    world.check()


def test_a_context_longer_than_keys_is_refused_at_launch() -> None:
    refuse_context(LONGEST - 1)
    with pytest.raises(ConfigError, match="lower --context-length"):
        refuse_context(LONGEST)


def test_revived_blocks_go_before_anything_else() -> None:
    world = World(4)
    block = [1, 5, 6, 7, 5, 2]
    run_alone(world, Request(1, [7, *block], {}, None), [3, 5, 4])
    run_alone(world, Request(2, [6, 6, 6], {}, None), [])
    for req in list(world.live):
        world.end(req, is_insert=True)
    reader = Request(3, [7, *block, 3], {}, None)  # from inside the memento: needs the block
    run_alone(world, reader, [])
    world.end(reader, is_insert=True)
    assert world.tree.revived_tokens == 4
    before = world.tree.evictable_size()
    world.tree.evict(EvictParams(num_tokens=1))
    assert before - world.tree.evictable_size() == 4
    continued = Request(4, [7, *block, 3, 5, 4, 6], {}, None)
    run_alone(world, continued, [])
    assert -continued.already_computed >= 0
    assert world.crossed == 1  # the memento and all behind it are still there


def test_ranks_take_revived_blocks_in_one_order() -> None:
    """A set has another order in each process: blocks of one access time must not depend on it."""
    world = World(12)
    block = [1, 5, 6, 7, 5, 2]
    run_alone(world, Request(1, [7, *block, 3, 5, 4, *block, 3, 5, 4], {}, None), [])
    world.end(world.live[0], is_insert=True)
    whole = Request(2, [7, *block, 3, 5, 4, *block, 3, 5, 4], {"keep_last_n_blocks": -1}, None)
    run_alone(world, whole, [])
    world.end(whole, is_insert=True)
    for cut in (4, 6):  # split the revived block, then walk over all its parts
        reader = Request(cut, [7, *block[:cut], 6], {}, None)
        run_alone(world, reader, [])
        world.end(reader, is_insert=True)
    last = Request(9, [7, *block, 6], {}, None)
    run_alone(world, last, [])
    revived = list(world.tree._revived)
    assert len(revived) > 1
    assert len({node.last_access_time for node in revived}) == 1
    orders = {
        tuple(node.id for node in sorted(order, key=world.tree._order))
        for order in permutations(revived)
    }
    assert len(orders) == 1


def test_kv_of_other_weights_is_never_matched() -> None:
    world = World(17, enable_kv_cache_events=True)
    run_alone(world, Request(1, FINISHED, {}, None), [])
    world.end(world.live[0], is_insert=True)
    running, barred = Request(2, [*FINISHED, 6], {}, None), Request(3, [6, 6, 6], {}, None)
    run_alone(world, running, [])
    run_alone(world, barred, [])
    held = world.tree.protected_size()
    before = world.tree.take_events()

    world.tree.weight_version += 1
    world.check()
    assert world.tree.evictable_size() == 0
    assert world.tree.protected_size() == held
    told = [h for event in world.tree.take_events() for h in event.block_hashes]
    stored = [e for e in before if hasattr(e, "token_ids")]
    assert sorted(told) == sorted(h for event in stored for h in event.block_hashes)

    again = Request(4, [*FINISHED, 6], {}, None)
    world.waiting.append(again)
    world.resume()
    assert again.prefix_len == 0
    world.prefill(again, 4)
    for req in (barred, running):  # KV of two weights: nothing of it enters the tree
        assert world.compute(req, len(req.ids))
        total = world.tree.total_size()
        world.end(req, is_insert=True)
        assert world.tree.total_size() < total
    world.check()
    assert {stem.namespace.version for stem in world.tree.root_node.children.values()} == {1}
    assert not world.tree.take_events()[1:]


def test_salts_and_extra_keys_keep_requests_apart() -> None:
    world = World(18)
    for number, (extra, salt) in enumerate([(None, None), ("a", None), (None, "a"), ("a", "a")]):
        req = Request(number, [5, 6, 7, 5], {}, extra)
        req.cache_salt = salt
        run_alone(world, req, [])
        world.end(req, is_insert=True)
        assert world.hits == 0
    assert len(world.tree.root_node.children) == 4


@pytest.mark.parametrize(("policy", "left"), [("lru", 2), ("lfu", 1), ("slru", 1), ("fifo", 2)])
def test_the_eviction_policy_is_the_one_asked_for(policy: str, left: int) -> None:
    """The first prompt comes three times, the second one once and last."""
    world = World(19, eviction_policy=policy)
    prompts = [[5, 6, 7, 5, 5], [7, 6, 5, 5, 5]]
    for number, which in enumerate((0, 0, 0, 1)):
        run_alone(world, Request(number, prompts[which], {}, None), [])
        world.end(world.live[0], is_insert=True)
    world.tree.evict(EvictParams(num_tokens=5))
    (stem,) = world.tree.root_node.children.values()
    assert [node.key[0] for node in stem.children.values()] == [prompts[left - 1][0]]


def test_a_waiting_prompt_is_kept_by_looking_at_it() -> None:
    world = World(20)
    for number, prompt in enumerate(([5, 6, 7, 5, 5], [7, 6, 5, 5, 5])):
        run_alone(world, Request(number, prompt, {}, None), [])
        world.end(world.live[0], is_insert=True)
    world.tree.touch_prefix(RadixKey(array("q", [5, 6, 7, 5, 5, 6])))
    world.tree.evict(EvictParams(num_tokens=5))
    (stem,) = world.tree.root_node.children.values()
    assert [node.key[0] for node in stem.children.values()] == [5]


def test_events_speak_of_plain_tokens() -> None:
    world = World(5, enable_kv_cache_events=True)
    text = [7, 1, 5, 6, 2, 3, 5, 4, 6, 7]
    run_alone(world, Request(1, text, {}, None), [])
    world.end(world.live[0], is_insert=True)
    stored = [event for event in world.tree.take_events() if hasattr(event, "token_ids")]
    assert [token for event in stored for token in event.token_ids][: len(text)] == text
    world.tree.evict(EvictParams(num_tokens=POOL))
    removed = [h for event in world.tree.take_events() for h in event.block_hashes]
    assert sorted(removed) == sorted(h for event in stored for h in event.block_hashes)


def test_pretty_print_tells_pruned_from_live(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(6)
    run_alone(world, Request(1, [7, 1, 5, 6, 2, 3, 5, 4, 6], {}, None), [])
    world.tree.pretty_print()
    printed = capsys.readouterr().out
    assert "2 pruned" in printed
    assert "live" in printed
    assert f"#tokens: {world.tree.protected_size()}" in printed
