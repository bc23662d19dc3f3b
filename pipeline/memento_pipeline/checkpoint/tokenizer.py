"""Tokens added to a tokenizer.json, without a class that reads the file in its own way.

transformers may rebuild a tokenizer by the rules of its class, whatever the file says: since 5.0 a
byte-level file whose class says Llama loses every space. So tokens are added to the file itself,
and where the class reads it otherwise, the new configuration names the class that takes it as it
is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from memento_pipeline.text.pairs import MARKERS
from memento_sgl.chat_template import TEMPLATE, TOKENIZER_CONFIG, tokenizer_config
from memento_sgl.errors import ConfigError, DataError
from memento_sgl.rule.config import shown

TURN = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
FILE = "tokenizer.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is, in every version of transformers."""
PROBE = "The block starts here:\n\n  x = 12345 (it's) \\frac{1}{2} ≤ été 数学\tdef f(): pass\n"
_WORDS = {
    "<think>": "think",
    "</think>": "end think",
    "<|im_start|>": "message start",
    "<|im_end|>": "message end",
}


class Added(NamedTuple):
    """New tokens: their ids, and the pieces of their words. `before`: ids that there were."""

    ids: dict[str, int]
    related: dict[str, list[int]]
    pieces: dict[str, list[str]]
    before: int


def load(folder: Path) -> Tokenizer:
    """The tokenizer.json of a folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
        DataError: text that it has cut does not come back.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # the library raises bare `Exception`
        raise ConfigError(f"{folder / FILE} cannot be read: {error}") from None
    back = tokenizer.decode(_ids(tokenizer, PROBE), skip_special_tokens=False)
    if back != PROBE:
        raise DataError(
            f"this tokenizer is damaged: {PROBE!r} comes back as {back!r}: start from the files "
            "that the model's publisher gives"
        )
    return tokenizer


def add_tokens(tokenizer: Tokenizer, chat: str) -> Added:
    """Add what a served model needs: the markers, the tags of a thought, and the tokens of turns
    where the template `chat` has them. What is there stays.

    Raises:
        ConfigError: nothing is missing, only some of the markers are, or one cannot be held.
        DataError: it knows no piece of a token's words.
    """
    wanted = [*MARKERS, *THINK, *(token for token in TURN if token in chat)]
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    known |= {token for token in wanted if _ids(tokenizer, token) == [tokenizer.token_to_id(token)]}
    missing = [token for token in wanted if token not in known]
    if not missing:
        raise ConfigError("SRC has all the tokens already: nothing to do")
    present = [marker for marker in MARKERS if marker in known]
    if present and (lacking := [marker for marker in MARKERS if marker not in known]):
        raise ConfigError(
            f"SRC has {', '.join(present)} but not {', '.join(lacking)}: start from a checkpoint "
            "that has none of them"
        )
    before = tokenizer.get_vocab_size(with_added_tokens=True)
    related = {token: _related(tokenizer, token) for token in missing}
    pieces = {
        token: [str(tokenizer.id_to_token(piece)) for piece in found]
        for token, found in related.items()
    }
    # Not "special", as `<think>` is not elsewhere: a decoder must show them. Turns are.
    tokenizer.add_tokens([_token(token) for token in missing])
    ids = {}
    for token in missing:
        number = tokenizer.token_to_id(token)
        if number is None or _ids(tokenizer, f"a{token}b").count(number) != 1:
            raise ConfigError(f"this tokenizer cannot hold {token} as one token")
        ids[token] = number
    return Added(ids, related, pieces, before)


def _token(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=text in TURN)


def _related(tokenizer: Tokenizer, token: str) -> list[int]:
    words = _WORDS.get(token, token.strip("<|>").replace("_", " "))
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
    found = [piece for piece in _ids(tokenizer, words) if piece != unknown_id]
    if not found:
        raise DataError(f"the tokenizer knows no piece of {words!r}: nothing to average")
    return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def write(tokenizer: Tokenizer, folder: Path, chat: str, added: Added) -> tuple[str, ...]:
    """Write tokenizer.json, its configuration and the chat template; returns notes for the user.

    `folder` holds the files of the source already.

    Raises:
        DataError: transformers reads other ids than the file has.
    """
    tokenizer.save(str(folder / FILE))
    (folder / TEMPLATE).write_text(chat, encoding="utf-8")
    config = tokenizer_config(folder)
    config.pop("chat_template", None)
    if isinstance(listed := config.get("added_tokens_decoder"), dict):
        for text, number in added.ids.items():
            flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            listed[str(number)] = {"content": text, **flags, "special": text in TURN}
    _write_config(folder, config)
    texts = [PROBE, *(f"a{token} b{token}\n{PROBE}" for token in added.ids)]
    wrong = _difference(tokenizer, folder, texts)
    if wrong is None:
        return ()
    before = str(config.get("tokenizer_class") or "of its own choice")
    config.pop("auto_map", None)
    _write_config(folder, config | {"tokenizer_class": PLAIN_CLASS})
    if (still := _difference(tokenizer, folder, texts)) is not None:
        raise DataError(
            f"transformers does not read {FILE} as it is, whichever class {TOKENIZER_CONFIG} "
            f"names: {still}"
        )
    return (
        f"note: transformers reads this {FILE} otherwise by the class {before}: the new checkpoint "
        f"names {PLAIN_CLASS}, which takes the file as it is",
    )


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _difference(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> str | None:
    """The first of `texts` that transformers cuts or joins otherwise than the file; None: none."""
    import transformers

    try:
        read = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    for text in texts:
        ids = _ids(tokenizer, text)
        if ids != list(read.encode(text, add_special_tokens=False)):
            return f"other ids for {shown(text)}"
        mine = tokenizer.decode(ids, skip_special_tokens=False)
        if mine != read.decode(ids, clean_up_tokenization_spaces=False):
            return f"other text for {shown(text)}"
    return None
