"""A character tokenizer: ASCII, the ChatML tokens and the block markers, one token each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from memento_sgl.demo.task import MAX_DIGITS
from memento_sgl.templates import template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISIBLE = [
    "<think>",
    "</think>",
    "<|block_start|>",
    "<|block_end|>",
    "<|summary_start|>",
    "<|summary_end|>",
    "system",
    "user",
    "assistant",
]
UNKNOWN = "\ufffd"
CHARACTERS = ["\n", *(chr(code) for code in range(32, 127)), UNKNOWN]
LIMIT = f"""{{#- Groups of up to {MAX_DIGITS} digits were learned: longer ones get wrong sums. -#}}
{{%- set asked = messages[-1].content if messages else '' -%}}
{{%- for word in (asked if asked is string else '').split() -%}}
{{%- if word[1:].isdigit() and word | length > {MAX_DIGITS + 1} -%}}
{{{{ raise_exception(word ~ ': the embedded model adds groups of at most {MAX_DIGITS} digits') }}}}
{{%- endif -%}}
{{%- endfor -%}}
"""
VOCABULARY = [*CONTROL, *VISIBLE, *CHARACTERS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded model; needs transformers. Other characters become U+FFFD."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in VISIBLE])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=UNKNOWN,
        chat_template=LIMIT + template("memento"),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
