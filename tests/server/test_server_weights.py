"""Weight updates under running requests: nothing that other weights computed is ever matched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import STRICT, Job, Served, random_jobs
from rollouts import Stream, Trainer, trainer_of

pytestmark = pytest.mark.server

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"enable": False},
    {"keep_last_n_blocks": 1},
    {"keep_last_block_for_answer": True},
    {"max_block_tokens": 6, "max_summary_tokens": 3},
    STRICT | {"max_blocks": 0},
)


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("weights", "qwen3", "--chunked-prefill-size", "48")


@pytest.fixture(scope="module")
def world(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    yield trainer_of(server, tmp_path_factory.mktemp("weights") / "B")
    server.assert_all_slots_free()


@pytest.fixture
def trainer(world: Trainer) -> Iterator[Trainer]:
    """A server that runs on weights A, and does again afterwards."""
    world.go_on()
    world.load("A")
    yield world
    world.go_on()


def jobs_of(
    seed: int, tokens: int = 260, options: tuple[dict[str, Any], ...] = OPTIONS
) -> list[Job]:
    return [(ids, tokens, each) for ids, _, each in random_jobs(len(options), seed, *options)]


def continued(jobs: list[Job], answers: list[dict[str, Any]], cut: int) -> list[Job]:
    """Requests whose prompts are what others had written."""
    made = []
    for (ids, _, options), answer in zip(jobs, answers, strict=True):
        prompt = ids + answer["output_ids"][:cut]
        made.append((prompt, 40, options | {"assistant_start": len(ids)}))
    return made


def updated_midway(
    trainer: Trainer, jobs: list[Job], mode: str, version: str
) -> tuple[list[Stream], list[Job]]:
    """Load "B" while `jobs` run on "A": their streams, from an output of about 90 tokens on, and
    jobs that share their text, which "B" alone answers. Each request goes over to "B"."""
    streams = trainer.stream(jobs)
    for stream in streams:
        stream.wait(90)
    trainer.pause(mode)
    trainer.load("B", weight_version=version)
    trainer.go_on()
    shared = continued(jobs, [{"output_ids": stream.output} for stream in streams], 80)
    trainer.generate("B", shared)
    for stream in streams:
        row = trainer.switched(stream, "A", "B", kept=mode == "in_place")
        assert row is not None
        assert 80 < row - len(stream.ids) < 499
        trainer.assert_told(stream, version, kept=mode == "in_place")
    return streams, shared


def test_a_retracted_request_is_computed_again(trainer: Trainer) -> None:
    """Tokens after the update are those of the new weights over KV of their own, and so are those
    of new requests that share the text."""
    jobs = jobs_of(1)
    _, shared = updated_midway(trainer, jobs, "retract", "B")
    trainer.generate("B", jobs)
    trainer.load("A")
    trainer.generate("A", [*jobs, *shared])


def test_a_pause_without_an_update_changes_nothing(trainer: Trainer) -> None:
    for mode in ("retract", "in_place"):
        streams = trainer.stream(jobs_of(2))
        for stream in streams:
            stream.wait(80)
        trainer.pause(mode)
        trainer.go_on()
        for stream in streams:
            assert trainer.switched(stream, "A", "B", kept=False) is None


def test_in_place_keeps_old_kv_in_the_request_alone(trainer: Trainer) -> None:
    """The request goes on with what it has; what it computed reaches nobody else."""
    jobs = jobs_of(3, 500)
    streams, early = updated_midway(trainer, jobs, "in_place", "B in place")
    answers = [stream.finish() for stream in streams]
    trainer.generate("B", [*jobs, *continued(jobs, answers, 190), *early])


def test_in_place_between_the_chunks_of_a_prompt(trainer: Trainer) -> None:
    """The pause comes while a long prompt is read: its first chunks are in the tree already, and
    what is read later may not stand behind them."""
    (ids, _, _), *_ = random_jobs(1, 4)
    prompt = (ids * 100)[:2400]
    job: Job = (prompt, 20, {})
    (stream,) = trainer.stream([job])
    trainer.server.wait_until_busy()
    trainer.pause("in_place")
    trainer.load("B")
    trainer.go_on()
    mixed = stream.finish()["output_ids"]
    answers = trainer.generate("B", [job, (prompt[:2000], 20, {})])
    assert mixed != answers[0]["output_ids"]
    trainer.load("A")
    assert mixed != trainer.generate("A", [job])[0]["output_ids"]


def test_abort(trainer: Trainer) -> None:
    """Aborted requests end with the old weights; what they left is not matched by the new ones."""
    jobs = jobs_of(5, 500)
    streams = trainer.stream(jobs)
    for stream in streams:
        stream.wait(100)
    trainer.pause("abort")
    trainer.load("B")
    trainer.go_on()
    for stream in streams:
        answer = stream.finish()
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert trainer.switched(stream, "A", "B", kept=False) is None
    answers = [stream.finish() for stream in streams]
    trainer.generate("B", [*jobs, *continued(jobs, answers, 90)])


def from_disk(trainer: Trainer, name: str) -> None:
    trainer.load(name)


def from_tensor(trainer: Trainer, name: str) -> None:
    import torch.multiprocessing as sharing
    from sglang.srt.utils import MultiprocessingSerializer

    tensors = [(key, tensor.clone()) for key, tensor in trainer.models[name].state_dict().items()]
    before = sharing.get_sharing_strategy()
    sharing.set_sharing_strategy("file_system")  # the other one needs a common parent process
    payload = MultiprocessingSerializer.serialize(tensors, output_str=True)
    sharing.set_sharing_strategy(before)
    trainer.post("/begin_weight_update")
    trainer.post(
        "/update_weights_from_tensor", serialized_named_tensors=[payload], flush_cache=False
    )
    trainer.post("/end_weight_update")


def from_distributed(trainer: Trainer, name: str) -> None:
    import torch
    from sglang.srt.utils import init_custom_process_group

    from memento_sgl.demo.server import free_port

    port, group = free_port(), f"update-{name}"
    address = {"master_address": "127.0.0.1", "master_port": port}
    place = {"rank_offset": 1, "world_size": 2, "group_name": group, "backend": "gloo"}
    joining = threading.Thread(
        target=trainer.post, args=("/init_weights_update_group",), kwargs=address | place
    )
    joining.start()
    mine = init_custom_process_group(
        backend="gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        world_size=2,
        rank=0,
        group_name=group,
    )
    joining.join()
    tensors = {name: tensor.clone() for name, tensor in trainer.models[name].state_dict().items()}
    trainer.post("/begin_weight_update")
    sending = threading.Thread(
        target=lambda: [torch.distributed.broadcast(t, src=0, group=mine) for t in tensors.values()]
    )
    sending.start()
    trainer.post(
        "/update_weights_from_distributed",
        names=list(tensors),
        dtypes=["float32"] * len(tensors),
        shapes=[list(tensor.shape) for tensor in tensors.values()],
        group_name=group,
        flush_cache=False,
    )
    sending.join()
    trainer.post("/end_weight_update")
    trainer.post("/destroy_weights_update_group", group_name=group)
    torch.distributed.destroy_process_group(mine)


@pytest.mark.parametrize("load", [from_disk, from_tensor, from_distributed])
def test_a_warm_cache_does_not_outlive_its_weights(
    trainer: Trainer, load: Callable[[Trainer, str], None]
) -> None:
    jobs = jobs_of(6, 60)
    answers = trainer.generate("A", jobs)
    again = continued(jobs, answers, 50)
    assert all(a["meta_info"]["cached_tokens"] > 0 for a in trainer.generate("A", again))
    load(trainer, "B")
    assert not any(a["meta_info"]["cached_tokens"] for a in trainer.generate("B", again[:1]))
    trainer.generate("B", again)
    assert all(a["meta_info"]["cached_tokens"] > 0 for a in trainer.generate("B", again))
    load(trainer, "A")
    assert not any(a["meta_info"]["cached_tokens"] for a in trainer.generate("A", again[:1]))


def test_memory_release_and_resume(trainer: Trainer) -> None:
    """Weights whose memory was given back are other weights, whoever fills it again."""
    jobs = jobs_of(7, 40)[:3]
    for tags in (["weights"], ["kv_cache"], ["kv_cache", "weights"]):
        trainer.load("A")
        trainer.generate("A", jobs)
        trainer.pause("retract")
        trainer.post("/release_memory_occupation", tags=tags)
        trainer.post("/resume_memory_occupation", tags=tags)
        trainer.go_on()
        assert not any(a["meta_info"]["cached_tokens"] for a in trainer.generate("A", jobs[:1]))
        trainer.load("B")
        trainer.generate("B", jobs)


def test_retracted_requests_survive_lost_memory(trainer: Trainer) -> None:
    """What verl and slime do between two batches, with requests still waiting."""
    streams = trainer.stream(jobs_of(8))
    for stream in streams:
        stream.wait(100)
    trainer.pause("retract")
    trainer.post("/release_memory_occupation")
    trainer.post("/resume_memory_occupation", tags=["weights"])
    trainer.load("B")
    trainer.post("/resume_memory_occupation", tags=["kv_cache", "cuda_graph"])
    trainer.go_on()
    for stream in streams:
        assert trainer.switched(stream, "A", "B", kept=False) is not None


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_flush_in_each_pause_mode(trainer: Trainer, mode: str) -> None:
    """In place it is refused while requests hold KV, and harms none of them."""
    jobs = jobs_of(9, 400)
    streams = trainer.stream(jobs)
    for stream in streams:
        stream.wait(60)
    trainer.pause(mode)
    flushed = trainer.server.post("/flush_cache").status_code == 200
    assert flushed == (mode != "in_place")
    trainer.go_on()
    for stream in streams:
        assert trainer.switched(stream, "A", "B", kept=False) is None
    trainer.generate("A", jobs)
