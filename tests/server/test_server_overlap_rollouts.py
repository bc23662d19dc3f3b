"""Rollout records of a real server: log-probabilities and accounting from the record alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import STRICT, Served, random_jobs, request_body
from typer.testing import CliRunner

from memento_sgl.cli.app import app
from memento_sgl.offline.rollout.record import RolloutRecord, read_rollouts, write_rollouts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served]) -> Served:
    return serve("overlap", "qwen3", "--chunked-prefill-size", "48")


Rollout = tuple[dict[str, Any], RolloutRecord]


def rollout(
    server: Served, seed: int, temperature: float, tokens: int = 200, **options: Any
) -> Rollout:
    ids, _, _ = random_jobs(1, seed=seed)[0]
    body = request_body(ids, tokens, **options) | {"return_logprob": True}
    body["sampling_params"] |= {"temperature": temperature}
    answer = server.post("/generate", **body).json()
    record = RolloutRecord.from_generate(
        answer,
        ids,
        server.markers,
        config=server.config,
        options=options,
        structure=server.structure,
        temperature=temperature,
        id=f"{seed}-{temperature}",
    )
    return answer, record


def worst(record: RolloutRecord, model: Any) -> float:
    assert record.logprobs is not None
    exact = record.recompute_logprobs(model)
    return float((torch.tensor(record.logprobs) - exact).abs().max())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_logprobs_from_the_record_alone(server: Served, temperature: float, tmp_path: Path) -> None:
    """They are log_softmax(logits / T); a greedy request's are those at T = 1."""
    evicted = 0
    for seed in range(11, 40):  # two, and more if those happened to finish no block
        if seed > 12 and evicted:
            break
        _, made = rollout(server, seed, temperature, 300)
        write_rollouts(tmp_path / "one.jsonl", [made])
        (record,) = read_rollouts(tmp_path / "one.jsonl")
        assert record == made
        assert worst(record, server.model) < 1e-3
        evicted += len(record.evictions)
    assert evicted > 0


def test_a_forgotten_eviction_or_temperature_shows(server: Served) -> None:
    """In the first sample with an eviction that is not near its end."""
    for seed in range(5, 80):
        _, record = rollout(server, seed, 1.5)
        known = len(record.prompt_ids) + len(record.output_ids)
        if record.evictions and record.machine_evictions[0].point < known - 40:
            break
    assert worst(record, server.model) < 1e-3
    assert worst(record.model_copy(update={"evictions": []}), server.model) > 1e-2
    assert worst(record.model_copy(update={"temperature": 1.0}), server.model) > 1e-2


CAPS = {"max_block_tokens": 4, "max_summary_tokens": 2}


@pytest.mark.parametrize("options", [CAPS, STRICT], ids=["caps", "strict"])
def test_constrained_emission_is_in_the_record(server: Served, options: dict[str, Any]) -> None:
    forced, missed = 0, 0.0
    for seed in range(3, 40):
        if forced > 3 and missed > 1e-2:
            break
        _, made = rollout(server, seed, 0.7, **options)
        record = RolloutRecord.parse(made.model_dump_json())
        assert record.logprobs is not None
        at = [record.logprobs[i - len(record.prompt_ids)] for i in record.forced]
        assert all(value == pytest.approx(0.0, abs=1e-6) for value in at)
        assert worst(record, server.model) < 1e-3
        missed = max(missed, worst(record.model_copy(update={"permitted": []}), server.model))
        forced += len(at)
    assert forced > 3
    assert missed > 1e-2


def test_simulated_figures_are_the_servers(server: Served, tmp_path: Path) -> None:
    jobs = [(seed, keep) for keep in (0, 1, 2, -1) for seed in (11, 12)]
    with ThreadPoolExecutor(8) as pool:
        made = list(
            pool.map(lambda job: rollout(server, job[0], 0.0, 600, keep_last_n_blocks=job[1]), jobs)
        )
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [record for _, record in made])
    tokenizer = str(server.model.config._name_or_path)
    command = ["simulate", str(path), "--json", "--keep-last-n-blocks", "0,1,2,-1"]
    done = CliRunner().invoke(app, [*command, "--tokenizer", tokenizer])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines()][:-1]
    seen = 0
    for number, ((answer, _), row) in enumerate(zip(made, rows, strict=True)):
        expected = answer["meta_info"]["memento"]
        expected.pop("measured_peak_kv_tokens", None)
        run = row["runs"][number // 2]
        assert {name: run[name] for name in expected} == expected
        seen += len(expected["evicted_spans"])
    assert seen > 5


def test_the_examples_of_the_page(
    server: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python tested\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    monkeypatch.chdir(tmp_path)
    for code in examples:
        code = code.replace("http://127.0.0.1:30000", server.url)
        exec(code.replace("./qwen3-memento", server.model.config._name_or_path), {})
    assert float(capsys.readouterr().out) < 1e-3
