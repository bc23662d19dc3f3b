"""Everything at once against one server with a tiny pool, for as long as wanted: `make soak`.

Every token that any request was given is compared with the oracle afterwards, also of requests
that were aborted or hung up on. The server checks after every step who owns each KV slot.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from conftest import STRICT, Served, request_body
from history import Answer, History, Update, explain, mismatches_of
from models import LETTERS, SPECIALS, build_model

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"enable": False},
    {"keep_last_n_blocks": 1},
    {"keep_last_n_blocks": -1},
    {"keep_last_block_for_answer": True},
    {"max_block_tokens": 6, "max_summary_tokens": 3},
    STRICT | {"max_blocks": 0},
)
BAD: tuple[dict[str, Any], ...] = (
    {"keep_last_n_blocks": -2},
    {"keep_last_n_block": 1},
    {"max_block_tokens": "six"},
    {"enable": "yes"},
    {"assistant_start": 10**6},
    {"max_block_tokens": 2**63},
    {"keep_last_n_blocks": 2**40},
    {"constrain": "strict", "max_block_tokens": -1},
)
CLIENTS = 10
POOL = 800
FLAGS = ("--chunked-prefill-size", "32", "--enable-priority-scheduling")


@dataclasses.dataclass
class Told:
    """What one request was told, and when it ran."""

    ids: list[int]
    options: dict[str, Any]
    begun: float
    ended: float = 0.0
    output: list[int] = dataclasses.field(default_factory=list)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


class Soak:
    """Clients and a trainer, each in a thread of its own until the clock ends."""

    def __init__(self, server: Served, folders: dict[str, str], seconds: float, seed: int) -> None:
        self.server, self.folders = server, folders
        self.seed, self.end = seed, time.monotonic() + seconds
        self.history = History("A")
        self.told: list[Told] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.recent: collections.deque[Told] = collections.deque(maxlen=30)
        self._lock = threading.Lock()

    def run(self) -> None:
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]
        threads.append(threading.Thread(target=self._trainer))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _loop(self, seed: int, act: Callable[[random.Random, httpx.Client], None]) -> None:
        rng = random.Random(self.seed * 1000 + seed)
        with httpx.Client(base_url=self.server.url, timeout=300) as client:
            while time.monotonic() < self.end and not self.failures:
                try:
                    act(rng, client)
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}"[:500])

    def _client(self, number: int) -> None:
        kinds = (self.plain, self.stream, self.hang_up, self.abort, self.batch, self.sampled)
        weights = (5, 4, 2, 2, 1, 1)

        def act(rng: random.Random, client: httpx.Client) -> None:
            if rng.random() < 0.08:
                self.bad(rng, client)
            else:
                rng.choices(kinds, weights)[0](rng, client)

        self._loop(number, act)

    # What clients do

    def _new(self, rng: random.Random) -> tuple[Told, dict[str, Any]]:
        options = rng.choice(OPTIONS)
        if self.recent and rng.random() < 0.5:
            base = rng.choice(self.recent)
            cut = rng.randint(0, len(base.output))
            ids = (base.ids + base.output[:cut])[:200]
            start = base.options.get("assistant_start", len(base.ids))
            options = base.options | {"assistant_start": min(start, len(ids))}
            if rng.random() < 0.3:
                options = rng.choice(OPTIONS) | {"assistant_start": options["assistant_start"]}
        else:
            letters = range(len(SPECIALS), len(SPECIALS) + len(LETTERS))
            ids = rng.choices(letters, k=rng.randint(2, 70))
        body = request_body(
            ids, rng.choice((1, 2, rng.randint(3, 60), rng.randint(60, 180))), **options
        )
        body["priority"] = rng.choice((0, 0, 0, 1, 5))
        body["return_logprob"] = rng.random() < 0.1
        return Told(ids, options, time.monotonic()), body

    def _keep(self, told: Told, output: list[int], meta: dict[str, Any], kind: str) -> None:
        told.ended, told.output, told.meta = time.monotonic(), output, meta
        reason = (meta.get("finish_reason") or {}).get("type", "cut off")
        with self._lock:
            self.counts[f"{kind} {reason}"] += 1
            self.counts["retractions"] += meta.get("num_retractions") or 0
            self.told.append(told)
            self.recent.append(told)

    def plain(self, rng: random.Random, client: httpx.Client) -> None:
        told, body = self._new(rng)
        response = client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        self._keep(told, answer["output_ids"], answer["meta_info"], "plain")

    def batch(self, rng: random.Random, client: httpx.Client) -> None:
        """One call, several prompts, one of them twice."""
        tolds, bodies = zip(*(self._new(rng) for _ in range(3)), strict=True)
        tolds, bodies = (*tolds, dataclasses.replace(tolds[0])), (*bodies, bodies[0])
        body = {key: [each[key] for each in bodies] for key in ("input_ids", "sampling_params")}
        response = client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        for told, answer in zip(tolds, response.json(), strict=True):
            self._keep(told, answer["output_ids"], answer["meta_info"], "batch")

    def sampled(self, rng: random.Random, client: httpx.Client) -> None:
        """Not compared: others share its batches."""
        _, body = self._new(rng)
        body["sampling_params"] |= {"temperature": 1.0, "frequency_penalty": 0.5}
        response = client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        with self._lock:
            self.counts["sampled"] += 1

    def stream(
        self, rng: random.Random, client: httpx.Client, stop: int | None = None, abort: bool = False
    ) -> None:
        told, body = self._new(rng)
        body |= {"stream": True, "rid": f"soak-{rng.getrandbits(64):016x}"}
        output: list[int] = []
        meta: dict[str, Any] = {}
        with client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(response.text)
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                output, meta = chunk["output_ids"], chunk["meta_info"]
                if stop is not None and len(output) >= stop:
                    if not abort:
                        break
                    httpx.post(f"{self.server.url}/abort_request", json={"rid": body["rid"]})
                    stop = None
        self._keep(told, output, meta, "abort" if abort else "stream")

    def hang_up(self, rng: random.Random, client: httpx.Client) -> None:
        self.stream(rng, client, stop=rng.randint(0, 60))

    def abort(self, rng: random.Random, client: httpx.Client) -> None:
        self.stream(rng, client, stop=rng.randint(0, 60), abort=True)

    def bad(self, rng: random.Random, client: httpx.Client) -> None:
        _, body = self._new(rng)
        if rng.random() < 0.2:
            body["input_ids"] = [*body["input_ids"], rng.choice((10**6, -1))]
        else:
            body["sampling_params"]["custom_params"]["memento"] |= rng.choice(BAD)
        response = client.post("/generate", json=body)
        assert response.status_code == 400, (response.status_code, response.text)
        with self._lock:
            self.counts["bad, refused"] += 1

    # What the trainer does

    def _trainer(self) -> None:
        self._loop(CLIENTS, self._step)

    def _step(self, rng: random.Random, client: httpx.Client) -> None:
        time.sleep(rng.uniform(1, 4))
        mode = rng.choice(("retract", "retract", "in_place", "in_place", "abort", "running"))
        if mode != "running":
            self._post(client, "/pause_generation", mode=mode)
        if rng.random() < 0.3:
            client.post("/flush_cache")
        if rng.random() < 0.6:
            self._load(client, rng, kept=mode == "in_place")
        if mode == "in_place" and rng.random() < 0.3:
            self._post(client, "/pause_generation", mode="retract")
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.5))
        self._post(client, "/continue_generation")
        with self._lock:
            self.counts[f"pause {mode}"] += 1

    def _load(self, client: httpx.Client, rng: random.Random, *, kept: bool) -> None:
        name = rng.choice(sorted(self.folders))
        begun = time.monotonic()
        self._post(
            client, "/update_weights_from_disk", model_path=self.folders[name], flush_cache=False
        )
        self.history.updates.append(Update(begun, time.monotonic(), name, kept))
        with self._lock:
            self.counts["weight updates"] += 1

    def _post(self, client: httpx.Client, path: str, **body: Any) -> None:
        response = client.post(path, json=body)
        assert response.status_code == 200, f"{path}: {response.text}"


@pytest.mark.server
@pytest.mark.timeout(0)
def test_soak(
    serve: Callable[..., Served],
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    server = serve("soak", "qwen3", *FLAGS, pool=POOL)
    folders = {"A": str(server.folder)}
    models = {"A": server.model}
    for seed, name in enumerate("BC", 1):
        folder = build_model(tmp_path_factory.mktemp("soak") / name, seed=seed)
        folders[name] = str(folder)
        models[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seed = pytestconfig.getoption("soak_seed")
    soak = Soak(server, folders, 60 * pytestconfig.getoption("minutes"), seed)
    soak.run()
    print(f"\nseed {seed}:", ", ".join(f"{k}: {v}" for k, v in sorted(soak.counts.items())))
    log = server.log.read_text(errors="replace")
    assert not soak.failures, (soak.failures[:3], log[-2000:])
    server.assert_all_slots_free()
    assert server.post("/flush_cache").status_code == 200
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
    wrong, mixed = verify(server, models, soak)
    tokens = sum(len(told.output) for told in soak.told)
    evicted = sum(len(t.meta.get("memento", {}).get("evicted_spans", [])) for t in soak.told)
    print(
        f"{len(soak.told)} answers, {tokens} tokens, {evicted} evictions in finished ones, "
        f"{mixed} answers under several weights, {len(wrong)} wrong"
    )
    assert not wrong, wrong[:2]


def verify(server: Served, models: dict[str, Any], soak: Soak) -> tuple[list[Any], int]:
    """Answers that no weights explain, and how many were written under several."""
    from memento_sgl.offline.reference import compare_greedy

    wrong, mixed = [], 0
    for told in soak.told:
        if not told.output:
            continue
        compare = partial(
            compare_greedy,
            prompt=told.ids,
            output=told.output,
            config=server.merged(told.options),
            markers=server.markers,
            assistant_start=told.options.get("assistant_start"),
            structure=server.structure,
        )
        answer = Answer(len(told.ids), partial(mismatches_of, models, compare, server.tie))
        first, updates = soak.history.during(told.begun, told.ended)
        found = explain(answer, first, updates)
        if found is None:
            wrong.append((told, first, updates, answer.mismatches(((first, 0),))[:5]))
        elif found != ((first, 0),):
            mixed += 1
    return wrong, mixed
