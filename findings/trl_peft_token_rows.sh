#!/bin/sh
# TRL 1.16.0 with PEFT 0.21.2: `trainable_token_indices` (training a few rows of the embedding beside LoRA) on a model with tied
# embeddings ends SFTTrainer's first step. TRL's fused head reads `lm_head.bias`; PEFT's wrapper of the trained rows has no
# such attribute. Seen: AttributeError, "'TrainableTokensWrapper' object has no attribute 'bias'". Without
# `trainable_token_indices` the same run trains.
# Fails if that changes: if the step succeeds, or fails in another way.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet 'torch==2.13.0' 'transformers==5.19.0' 'trl==1.16.0' 'peft==0.21.2'
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

words = {word: number for number, word in enumerate(["<pad>", "a", "b", "c", "d"])}
inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="d")


def train(**options):
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
        )
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir="out", max_steps=1, report_to="none", use_cpu=True, save_strategy="no", bf16=False),
        train_dataset=Dataset.from_dict({"text": ["a b c d"] * 8}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options),
    )
    trainer.train()


train()
try:
    train(trainable_token_indices={"embed_tokens": [1, 2]})
except AttributeError as error:
    assert "TrainableTokensWrapper" in str(error), error
    assert "bias" in str(error), error
    print("as found:", error)
else:
    sys.exit("changed: the step succeeds")
PY
