"""`memento_sgl.Engine` offline."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from memento_sgl.demo import MODEL_DIR
from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"<!-- tested -->\n```python\n(.*?)```", re.DOTALL)
SCRIPT = """
import json, sys
import memento_sgl

if __name__ == "__main__":
    model, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    engine = memento_sgl.Engine(
        model_path=model, memento={"keep_last_n_blocks": 1}, device="cpu", dtype="float32",
        attention_backend="torch_native", max_total_tokens=4000,
    )
    answers = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": 150, "ignore_eos": True},
    )
    engine.shutdown()
    json.dump(answers, open(out, "w"))
"""


def verify(folder: Path, prompts: list[list[int]], answers: list[dict[str, Any]]) -> int:
    """Compare with the oracle under the script's options; returns the evictions seen."""
    from conftest import TIE
    from models import build_tokenizer
    from transformers import AutoModelForCausalLM

    from memento_sgl.offline.reference import check_greedy
    from memento_sgl.rule.accounting import account
    from memento_sgl.rule.machine import replay
    from memento_sgl.rule.markers import resolve_markers

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = MementoConfig(enable=True, mask_delimiters=False, keep_last_n_blocks=1)
    markers = resolve_markers(config, build_tokenizer())
    evicted = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        output, record = answer["output_ids"], answer["meta_info"]["memento"]
        wrong = check_greedy(model, prompt, output, config, markers)
        assert not [mismatch for mismatch in wrong if mismatch.gap > TIE]
        machine = replay([*prompt, *output], len(prompt), markers, config)
        expected = account(machine, len(prompt), len(prompt) + len(output)).as_dict()
        record.pop("measured_peak_kv_tokens", None)
        assert json.loads(json.dumps(record)) == json.loads(json.dumps(expected))
        evicted += len(record["evicted_spans"])
    return evicted


@pytest.mark.server
def test_offline_generation(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from conftest import random_jobs

    folder = checkpoint("qwen3")
    script, out = tmp_path / "offline.py", tmp_path / "answers.json"
    script.write_text(SCRIPT)
    prompts = [ids for ids, _, _ in random_jobs(8, seed=61)]
    command = [sys.executable, str(script), str(folder), json.dumps(prompts), str(out)]
    environment = os.environ | {"MEMENTO_CHECK_SLOTS": "1"}
    subprocess.run(command, check=True, timeout=300, env=environment)
    assert verify(folder, prompts, json.loads(out.read_text())) > 1


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_an_engine_in_a_ray_actor(checkpoint: Callable[[str], Path]) -> None:
    """The actor of docs/scale.md, as it stands there but for the GPU."""
    from conftest import random_jobs

    ray = pytest.importorskip("ray", reason="pip install 'memento-sgl[ray]'")

    (code,) = SNIPPET.findall((ROOT / "docs" / "scale.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(code.replace("num_gpus=1", "num_cpus=1"), names)
    options = {"dtype": "float32", "attention_backend": "torch_native", "max_total_tokens": 4000}
    sampling = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
    folder = checkpoint("qwen3")
    prompts = [ids for ids, _, _ in random_jobs(8, seed=61)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actor = names["Reasoner"].remote(str(folder), **options)
        request = actor.generate.remote(input_ids=prompts, sampling_params=sampling)
        answers = ray.get(request)
        ray.get(actor.stop.remote())
    finally:
        ray.shutdown()
    assert verify(folder, prompts, answers) > 1


@pytest.mark.server
def test_the_readmes_program(tmp_path: Path) -> None:
    """As it stands in README.md, saved as a file, on this machine's device."""
    _, code = SNIPPET.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (tmp_path / "qwen3-memento").symlink_to(MODEL_DIR)
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The total is" in done.stdout
    assert done.stdout.strip().endswith(" 49")


def test_an_engine_outside_the_main_guard_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process that SGLang starts, which imports the program again."""
    import memento_sgl

    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match=r'if __name__ == "__main__":'):
        memento_sgl.Engine(model_path=str(MODEL_DIR))


def test_bad_options_raise_before_anything_starts() -> None:
    import memento_sgl

    with pytest.raises(ConfigError, match="unknown option 'keep'"):
        memento_sgl.Engine(model_path="none", memento={"keep": 1})
    with pytest.raises(ConfigError, match=r"use sglang\.Engine"):
        memento_sgl.Engine(model_path="none", memento={"enable": False})
