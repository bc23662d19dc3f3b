"""A tokenizer whose spans can be checked by eye."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "assistant"),
    *("<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>"),
    *("<think>", "</think>"),
)


def character_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json: one token per marker and per printable ASCII character, "?" for all
    other characters."""
    characters = [*(chr(code) for code in range(32, 127)), "\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path
