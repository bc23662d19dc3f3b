"""Chat markup learned from templates: the publishers' own, as TRL ships them, and shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from memento_sgl.chat_template import renderer
from memento_sgl.errors import MarkerError
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine, State
from memento_sgl.rule.markers import resolve_markers
from memento_sgl.rule.markup import Markup, check_header, learn, settle_markup
from memento_sgl.templates import template

CHATML = {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"}
LLAMA3 = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
DEEPSEEK = {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"}
DEEPSEEK |= {
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end")
}
DEEPSEEK |= {"<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"}
DEEPSEEK |= {"<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"}
HARMONY = {"<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"}
GEMMA = {"<bos>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁"}
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
DEFAULT = ("<|im_start|>", "assistant", "<|im_end|>", (), ())


def of_trl(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def learned(source: str, added: Collection[str]) -> Markup:
    render = renderer(source, {"bos_token": "<s>", "eos_token": "<｜end▁of▁sentence｜>"})
    return learn(render, added)


@pytest.mark.parametrize(
    ("source", "added", "markup"),
    [
        (lambda: of_trl("qwen3"), CHATML, DEFAULT),
        (lambda: of_trl("qwen2_5"), CHATML, DEFAULT),
        (lambda: template("memento"), CHATML, DEFAULT),
        (lambda: template("memento_nosys"), CHATML | {"assistant"}, DEFAULT),
        (lambda: PHI4, CHATML | {"<|im_sep|>"}, DEFAULT),
        (
            lambda: of_trl("llama3"),
            LLAMA3,
            ("<|start_header_id|>", "assistant", "<|eot_id|>", (), ()),
        ),
        (
            lambda: of_trl("gemma3"),
            GEMMA,
            ("<start_of_turn>", "model", "<end_of_turn>", (), ()),
        ),
        (lambda: of_trl("gptoss"), HARMONY, ("<|start|>", "assistant", "<|end|>", (), ())),
        (
            lambda: of_trl("deepseekv3"),
            DEEPSEEK,
            (
                *("<｜Assistant｜>", "", "<｜end▁of▁sentence｜>"),
                *(("<｜tool▁outputs▁end｜>",), ("<｜User｜>",)),
            ),
        ),
        (lambda: ZEPHYR, {"<|user|>", "<|assistant|>", "</s>"}, None),
        (lambda: MISTRAL, {"[INST]", "[/INST]", "</s>"}, None),
    ],
)
def test_published_templates(
    source: Callable[[], str], added: set[str], markup: tuple[object, ...] | None
) -> None:
    found = learned(source(), added)
    if markup is None:
        opener, user = (
            ("<|assistant|>", "<|user|>") if "<|user|>" in added else ("[/INST]", "[INST]")
        )
        markup = (opener, "", "</s>", (), (user,))
    assert found[:5] == markup
    assert found.opening.startswith(found.im_start + found.assistant)


@pytest.mark.parametrize(
    ("source", "added", "said"),
    [
        (ZEPHYR, {"</s>"}, "which is no token of its own"),
        (ZEPHYR, {"<|assistant|>"}, "no token ends the assistant's turn"),
        ("{{ raise_exception('no') }}", CHATML, r"refuses a plain conversation \(no\)"),
        ("{{ messages[0].content }}", CHATML, "does not show each message once"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", CHATML, "nothing stands before"),
        (PHI4.replace("{{ m.role }}", "x"), CHATML | {"<|im_sep|>"}, "no role is told|nothing"),
    ],
)
def test_what_cannot_be_learned_is_one_line_that_names_the_flags(
    source: str, added: set[str], said: str
) -> None:
    with pytest.raises(MarkerError, match=said) as error:
        learned(source, added)
    assert "\n" not in str(error.value)
    assert "--memento-im-start-token" in str(error.value)


def test_what_is_said_by_hand_is_not_learned() -> None:
    render = renderer(of_trl("llama3"), {"bos_token": "<s>"})
    config, markup = settle_markup(MementoConfig(), render, "", LLAMA3)
    assert markup is not None
    assert (config.im_start_token, config.im_end_token) == ("<|start_header_id|>", "<|eot_id|>")
    for said in ({"im_start_token": "<|im_start|>"}, {"require_assistant_section": False}):
        config = MementoConfig.model_validate(said)
        assert settle_markup(config, render, "", LLAMA3) == (config, None)


def test_a_chatml_template_that_refuses_the_probe_keeps_the_defaults() -> None:
    source = "{% if messages[1] %}{{ raise_exception('one only') }}{% endif %}<|im_start|>"
    config = MementoConfig()
    assert settle_markup(config, renderer(source, {}), source, CHATML) == (config, None)
    with pytest.raises(MarkerError, match="one only"):
        settle_markup(config, renderer(source, {}), source, LLAMA3)


MARKERS = ["<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>"]


def write_tokenizer(folder: Path, source: str, added: Collection[str]) -> TextTokenizer:
    """Added tokens, and "ass", "istant" and single characters for the rest."""
    pieces = ["ass", "istant", *map(chr, range(32, 127)), "\n"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("ass", "isolated"), pre_tokenizers.Split("istant", "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in sorted({*added, *MARKERS})])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return TextTokenizer(folder)


def states(tokenizer: TextTokenizer, text: str) -> str:
    """One letter per token of a text: whether markers would count behind it."""
    config, markup = tokenizer.own_markup(MementoConfig(enable=True, mask_delimiters=False))
    markers = resolve_markers(config, tokenizer)
    assert markup is not None
    check_header(markers, markup, tokenizer)
    machine = BlockMachine(markers, config)
    told = ""
    for index, token in enumerate(tokenizer.encode(text)):
        if token in machine.classes:
            machine.feed(index, token)
        told += {State.NO_SECTION: "-", State.ROLE: "?"}.get(machine.state_before(index + 1), "A")
    return told


def test_a_name_of_two_tokens_is_followed_token_by_token(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, template("memento_nosys"), CHATML)
    assert resolve_markers(MementoConfig(), tokenizer).header == tuple(
        tokenizer.encode("<|im_start|>assistant")
    )
    assert states(tokenizer, "<|im_start|>assistant\n<|im_end|>ass") == "??AA--"
    assert states(tokenizer, "<|im_start|>assass<|im_start|>assistantistant") == "??-??AA"
    assert states(tokenizer, "<|im_start|><|im_start|>assistantass<|im_start|>istant") == "???AA?-"
    assert states(tokenizer, "assistant<|im_start|>ass istant") == "--??--"


def test_a_header_of_one_token_and_turns_of_other_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, of_trl("deepseekv3"), DEEPSEEK)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}', "utf-8"
    )
    text = "<｜User｜>a<｜Assistant｜>a<｜end▁of▁sentence｜><｜Assistant｜><｜User｜>a"
    assert states(tokenizer, text) == "--AA-A--"
    assert states(tokenizer, "<｜User｜>a<｜tool▁outputs▁end｜>a") == "--AA"


def test_a_new_section_abandons_a_block(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, ZEPHYR, {"<|user|>", "<|assistant|>", "</s>"})
    config, _ = tokenizer.own_markup(MementoConfig(enable=True, mask_delimiters=False))
    machine = BlockMachine(resolve_markers(config, tokenizer), config)
    block = "<|block_start|>a<|block_end|><|summary_start|>"
    text = f"<|assistant|>{block}<|assistant|><|summary_end|>{block}b<|summary_end|>"
    assert len(machine.feed_all(tokenizer.encode(text))) == 1
    assert machine.blocks[0].start == 7
