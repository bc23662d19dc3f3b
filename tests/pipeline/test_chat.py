"""Chat templates: the same text as transformers, and marks that trainers find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memento_pipeline.output.chat import ChatTemplate, load_template

from memento_sgl.chat_template import chat_environment
from memento_sgl.demo import MODEL_DIR
from memento_sgl.errors import ConfigError
from memento_sgl.templates import template

BLOCKS = "<|block_start|>1+1<|block_end|>\n<|summary_start|>2<|summary_end|>\n"
RESPONSE = f"<think>\n{BLOCKS}</think>\n\nTwo."
MESSAGES = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": RESPONSE},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes <b>&amp;</b>.", "reasoning_content": "hm"},
]
OTHERS = {
    "breaks": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}|{% endfor %}",
    "skips": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "json": "{{ messages[3] | tojson(indent=1) }}{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("source", [*OTHERS, "memento", "memento_nosys"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(source: str, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    text = OTHERS.get(source) or template(source)
    ours = chat_environment().from_string(text)
    (theirs,), _ = transformers.render_jinja_template(
        [MESSAGES], chat_template=text, add_generation_prompt=prompt
    )
    assert ours.render(messages=MESSAGES, add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize("name", ["memento", "memento_nosys"])
def test_marks_cover_what_the_assistant_says(name: str) -> None:
    """Each answer and the end of its turn, and nothing else: what `assistant_only_loss` trains."""
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), (spans,) = transformers.render_jinja_template(
        [MESSAGES], chat_template=template(name), return_assistant_tokens_mask=True
    )
    said = [text[start:end] for start, end in spans]
    second = "<think>\nhm\n</think>\nYes <b>&amp;</b>.<|im_end|>"
    assert said == [f"{RESPONSE}<|im_end|>", second]


def test_the_tokenizer_masks_them() -> None:
    """Through the tokenizer of the embedded model, as trainers ask it."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    done = tokenizer.apply_chat_template(
        MESSAGES[:2], return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    mask, ids = done["assistant_masks"], done["input_ids"]
    learned = [token for token, learn in zip(ids, mask, strict=True) if learn]
    assert tokenizer.decode(learned) == f"{RESPONSE}<|im_end|>"


def test_special_tokens(tmp_path: Path) -> None:
    """They come from the tokenizer's configuration, or are an error: never silently empty."""
    text = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    file = tmp_path / "own.jinja"
    file.write_text(text)
    with pytest.raises(ConfigError, match="bos_token, eos_token"):
        load_template(str(file))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": text}
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    (elsewhere / "tokenizer_config.json").write_text(json.dumps(config))
    for source, tokenizer in ((file, elsewhere), (elsewhere, None)):
        made = load_template(str(source), tokenizer)
        assert made.render("Q", "A") == ("<s>Q</s>", "A</s>")
    with pytest.raises(ConfigError, match="holds neither"):
        load_template(str(tmp_path))
    assert ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render("Q", "A")
