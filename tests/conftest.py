"""Shared servers and models. A server start takes half a minute: tests share them by fixture."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

# Float32 sums in another order differ by less; a token that saw wrong KV is off by far more. The
# check is teacher-forced, so what follows a tie is verified too.
TIE = 5e-4
os.environ["MEMENTO_CONFIG"] = os.devnull  # not the user's own
os.environ.pop("MEMENTO_BASE_URL", None)
CHECKS = {"MEMENTO_CHECK_SLOTS": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


def pytest_configure(config: pytest.Config) -> None:
    """C++ extensions are built in a folder of this run: a lock that a killed process left in the
    user's own would be waited for without end."""
    folder = tempfile.TemporaryDirectory(prefix="memento-extensions-")
    config.add_cleanup(folder.cleanup)
    os.environ["TORCH_EXTENSIONS_DIR"] = folder.name


# Prompt ids, tokens to generate, per-request options.
Job = tuple[list[int], int, dict[str, Any]]


@dataclasses.dataclass
class Served:
    """A running server with its oracle: the same weights in Hugging Face."""

    url: str
    model: Any = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    config: Any
    markers: Any
    structure: Any
    log: Path
    folder: Path
    tie: float = TIE

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=300)

    def generate(
        self, ids: list[int], tokens: int, *, ignore_eos: bool = True, **options: Any
    ) -> dict[str, Any]:
        body = request_body(ids, tokens, **options)
        body["sampling_params"]["ignore_eos"] = ignore_eos
        response = self.post("/generate", **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def machine(self, ids: list[int], output: list[int], **options: Any) -> Any:
        from memento_sgl.rule.machine import replay

        config = self.merged(options)
        start = options.get("assistant_start")
        return replay([*ids, *output], len(ids), self.markers, config, assistant_start=start)

    def merged(self, options: dict[str, Any]) -> Any:
        from memento_sgl.rule.config import RequestOptions

        return self.config.for_request(RequestOptions.parse(options))

    def verify(self, ids: list[int], answer: dict[str, Any], **options: Any) -> int:
        """Compare with the oracle: tokens, spans, accounting. Returns the evictions seen."""
        from memento_sgl.offline.reference import check_greedy
        from memento_sgl.rule.accounting import account, kv_curve

        output, config = answer["output_ids"], self.merged(options)
        start = options.get("assistant_start")
        wrong = check_greedy(
            self.model,
            ids,
            output,
            config,
            self.markers,
            assistant_start=start,
            structure=self.structure,
        )
        clear = [mismatch for mismatch in wrong if mismatch.gap > self.tie]
        assert not clear, clear[:3]
        record = answer["meta_info"].get("memento")
        if not config.enable:
            assert record is None
            return 0
        machine = self.machine(ids, output, **options)
        expected = account(machine, len(ids), len(ids) + len(output)).as_dict()
        measured = record.pop("measured_peak_kv_tokens", None)
        assert record == json.loads(json.dumps(expected))
        if measured is not None and len(output) > 1:
            # The engine counted slots after each step; a step in flight may hold one more. What was
            # cached never stood in the request's row with the blocks that it evicts.
            cached = answer["meta_info"].get("cached_tokens", 0)
            held = kv_curve(machine.evictions, len(ids) + len(output) - 1)
            least = max(held[min(cached, len(ids)) :])
            assert least - 1 <= measured <= expected["peak_kv_tokens"] + 1, (measured, expected)
        return len(expected["evicted_spans"])

    def generate_many(
        self, jobs: list[Job], concurrency: int, *, ignore_eos: bool = True
    ) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(
                pool.map(
                    lambda job: self.generate(job[0], job[1], ignore_eos=ignore_eos, **job[2]),
                    jobs,
                )
            )

    def verify_many(self, jobs: list[Job], concurrency: int, *, ignore_eos: bool = True) -> int:
        """Generate and verify; returns the evictions seen."""
        answers = self.generate_many(jobs, concurrency, ignore_eos=ignore_eos)
        return self.verify_all(jobs, answers)

    def verify_all(self, jobs: list[Job], answers: list[dict[str, Any]]) -> int:
        return sum(
            self.verify(ids, answer, **options)
            for (ids, _, options), answer in zip(jobs, answers, strict=True)
        )

    def loads(self) -> list[dict[str, Any]]:
        """What each scheduler holds, as SGLang tells: requests running and waiting, slots used."""
        loads: list[dict[str, Any]]
        loads = httpx.get(f"{self.url}/v1/loads", timeout=60).raise_for_status().json()["loads"]
        assert loads
        return loads

    def wait_until_busy(self) -> None:
        """Until a request holds KV slots."""
        deadline = time.monotonic() + 60
        while not any(load["num_used_tokens"] for load in self.loads()):
            assert time.monotonic() < deadline

    def assert_all_slots_free(self) -> None:
        """Nothing runs, nothing waits, no KV slot is in use."""
        for _ in range(50):
            loads = self.loads()
            if all(
                load["num_running_reqs"] == load["num_waiting_reqs"] == load["num_used_tokens"] == 0
                for load in loads
            ):
                return
            time.sleep(0.1)  # SGLang publishes them from time to time
        raise AssertionError(loads)


def request_body(ids: list[int], tokens: int, **options: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": sampling | {"custom_params": {"memento": options}}}


def random_jobs(
    count: int, seed: int, *option_sets: dict[str, Any], longest: int = 200
) -> list[Job]:
    """Random prompts (letters only) with random output lengths; options in turn."""
    from models import LETTERS, SPECIALS

    rng = random.Random(seed)
    letters = range(len(SPECIALS), len(SPECIALS) + len(LETTERS))
    return [
        (
            rng.choices(letters, k=rng.randint(4, 60)),
            rng.randint(30, longest),
            (option_sets or ({},))[i % max(1, len(option_sets))],
        )
        for i in range(count)
    ]


STRICT: dict[str, Any] = {
    "constrain": "strict",
    "min_block_tokens": 1,
    "max_block_tokens": 7,
    "max_summary_tokens": 4,
    "max_blocks": 3,
    "min_blocks": 1,
}


def spell(server: Served, tokens: list[int]) -> str:
    """T <think>, t </think>, B b block, M m memento, E end, n white space, ! a marker that no
    output may hold, x anything else."""
    markers = server.markers
    names = dict.fromkeys(server.structure.separators, "n") | {
        token: letter for token, letter in zip(markers[:9], "BbMm!!xTt", strict=True)
    }
    names |= dict.fromkeys(server.structure.ends, "E")
    return "".join(names.get(token, "x") for token in tokens)


def verify_strict_samples(server: Served, count: int, seed: int, concurrency: int = 16) -> None:
    """Sample at temperature 1 with strict emission; every output must be well-formed."""
    options = STRICT | {"max_block_tokens": 4, "max_summary_tokens": 2, "max_blocks": 2}
    shape = re.compile(r"Tn{0,2}(B[xn]{1,4}bn{0,2}M[xn]{0,2}mn{0,2}){1,2}t[xn]*E?")
    rng = random.Random(seed)

    def sample(ids: list[int]) -> dict[str, Any]:
        body = request_body(ids, rng.randint(36, 44), **options)
        body["sampling_params"] |= {"temperature": 1.0, "ignore_eos": False}
        response = server.post("/generate", **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    prompts = [ids for ids, _, _ in random_jobs(count, seed)]
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(sample, prompts))
    assert len(answers) == count
    spelled = [spell(server, answer["output_ids"]) for answer in answers]
    assert not [text for text in spelled if not shape.fullmatch(text)][:3]
    assert len(set(spelled)) > count // 2
    assert sum(text.count("B") for text in spelled) > count
    assert sum(len(a["meta_info"]["memento"]["evicted_spans"]) for a in answers) > count // 2


def verify_lengths_around_evictions(server: Served, seed: int) -> None:
    """A request that ends at, before or behind a step that is done again ends with every token that
    it asked for, and leaves no slot behind. SGLang leaves a request out of the next step when the
    one in flight reaches its length, which a step that is going to be ignored does not."""
    for ids, _, _ in random_jobs(20, seed):
        whole = server.generate(ids, 160)["output_ids"]
        points = [eviction.point - len(ids) for eviction in server.machine(ids, whole).evictions]
        if len(points) > 1:
            break
    else:
        raise AssertionError("no prompt leads to two evictions")
    lengths = sorted({p + d for p in points[:3] for d in range(-1, 5) if p + d <= len(whole)})
    jobs: list[Job] = [(ids, length, {}) for length in lengths]
    answers = server.generate_many(jobs, concurrency=4)
    for length, answer in zip(lengths, answers, strict=True):
        assert answer["output_ids"] == whole[:length], length
    assert server.verify_all(jobs, answers) > len(points[:3])
    server.assert_all_slots_free()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds each rigged random model once; "demo" is the embedded one. "qwen3-head64": with heads
    of another size, which kernels of a GPU need."""
    from models import build_model

    from memento_sgl.demo import MODEL_DIR

    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        if family == "demo":
            return MODEL_DIR
        folder = root / family
        name, _, size = family.partition("-head")
        return folder if folder.is_dir() else build_model(folder, name, head_dim=int(size or 16))

    return get


@pytest.fixture(scope="session")
def serve(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Served]]:
    """Starts servers; one runs at a time, a different request replaces it."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from memento_sgl.demo.server import running_server, serve_command
    from memento_sgl.rule.config import MementoConfig
    from memento_sgl.rule.emission import resolve_structure
    from memento_sgl.rule.markers import resolve_markers

    torch.set_num_threads(1)
    logs = tmp_path_factory.mktemp("logs")
    stack = ExitStack()
    current: dict[str, Served] = {}

    def get(
        name: str,
        family: str,
        *flags: str,
        pool: int = 20000,
        environment: dict[str, str] | None = None,
        launcher: Callable[..., list[str]] = serve_command,
        **config: Any,
    ) -> Served:
        if name in current:
            return current[name]
        stack.close()
        current.clear()
        folder = checkpoint(family)
        common = ["--max-total-tokens", str(pool), "--dtype", "float32", *flags]
        common += ["--log-level", "warning", "--random-seed", "1"]
        for option, value in config.items():
            common += [f"--memento-{option.replace('_', '-')}", json.dumps(value)]
        log = logs / f"{name}.log"
        url = stack.enter_context(
            running_server(
                launcher(str(folder), *common),
                log,
                environment=CHECKS | (environment or {}),
                timeout=500,
            )
        )
        # Not AutoTokenizer: it makes a byte-level one of whatever stands in a Qwen2 folder.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        settled = MementoConfig(enable=True, **({"mask_delimiters": False} | config))
        current[name] = Served(
            url=url,
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            tokenizer=tokenizer,
            config=settled,
            markers=resolve_markers(settled, tokenizer),
            structure=resolve_structure(tokenizer, {tokenizer.eos_token_id}),
            log=log,
            folder=folder,
        )
        return current[name]

    with stack:
        yield get


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=10.0, help="length of tests/soak.py")
    parser.addoption("--soak-seed", type=int, default=0, help="random choices of tests/soak.py")
