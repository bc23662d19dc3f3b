"""`memento init-model`: the four marker tokens for a Hugging Face checkpoint.

A new row is the mean of the rows of related tokens plus noise N(0, 0.01) (paper, A.2.1; 0.01 is
the standard deviation). Related to `<|block_start|>` are the tokens into which the tokenizer cuts
the words of its name, here the text "block start", without the leading space that they would have
inside a sentence; a piece that occurs twice counts twice, unknown-token pieces are left out. Input
and untied output rows are made alike, each from its own matrix; tied ones share the input's. An
output bias gets the mean without noise.

Rows that the checkpoint keeps beyond its tokenizer (padding of the vocabulary) are used before the
matrix is lengthened. Nothing else changes, bit for bit, and no weights are loaded: the names of the
matrices come from the model on the meta device, the rows from the files (see `_weights`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from memento_pipeline.checkpoint.files import Checkpoint, Names, open_checkpoint
from memento_pipeline.checkpoint.weights import FLOATS, Matrix, read_row
from memento_pipeline.output.chat import load_template
from memento_pipeline.text.pairs import MARKERS
from memento_sgl.errors import ConfigError, DataError

IM_START = "<|im_start|>"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_INDEX = ".index.json"
_PROBE = "The block starts here:\n\n  x = 12345 (it's) \\frac{1}{2} ≤ été 数学\tdef f(): pass\n"


class Initialised(NamedTuple):
    """What was done. `related`: the token pieces that were averaged, by marker."""

    token_ids: dict[str, int]
    related: dict[str, list[str]]
    rows_before: int
    rows_after: int
    tied: bool
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        matrices = "tied embeddings" if self.tied else "input and output embeddings"
        if self.rows_before == self.rows_after:
            size = f"{self.rows_before:,} rows as before, spare ones were used"
        else:
            size = f"{self.rows_before:,} rows, now {self.rows_after:,}"
        return "\n".join([f"{matrices}: {size}", *self.notes])


def init_model(
    source: Path,
    target: Path,
    *,
    template: str = "memento_nosys",
    seed: int = 0,
    noise: float = 0.01,
) -> Initialised:
    """Write `source` with the marker tokens to `target`.

    Args:
        template: chat template to save with the tokenizer: of this project by name, or a file.
        noise: standard deviation.

    Raises:
        ConfigError: torch or transformers is missing, `target` is not empty, `source` is no causal
            language model, or has some of the tokens already.
        DataError: weights that are damaged, quantised, or do not fit the tokenizer.
    """
    transformers = _transformers()
    _check_folders(source, target)
    chat = load_template(template).source
    config, tokenizer, names = _described(transformers, source)
    before = len(tokenizer)
    related = _related(tokenizer)
    ids = _add_markers(tokenizer)
    tokenizer.chat_template = chat
    with _new_folder(target) as folder:
        _copy_others(source, folder)
        tokenizer.save_pretrained(folder)
        checkpoint = open_checkpoint(source, folder, names)
        rows = checkpoint.rows
        if rows < before:
            raise DataError(f"{before} tokens in the tokenizer, but only {rows} embeddings")
        changes = _new_rows(checkpoint, ids, related, seed, noise)
        after = max(rows, *(token + 1 for token in ids.values()))
        if sorted(token for token in ids.values() if token >= rows) != list(range(rows, after)):
            raise DataError(f"the tokenizer's new ids {ids} leave a gap after {rows} embeddings")
        checkpoint.write(folder, changes)
        _write_config(source, folder, config, rows, after)
    pieces = {
        marker: [str(piece) for piece in tokenizer.convert_ids_to_tokens(tokens)]
        for marker, tokens in related.items()
    }
    notes = (*_markup_notes(tokenizer, chat), *_reading_notes(tokenizer, source))
    return Initialised(ids, pieces, rows, after, names.tied, notes)


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"memento init-model needs torch and transformers ({error}): install memento-sgl[hf]"
        ) from None
    return transformers


def _check_folders(source: Path, target: Path) -> None:
    if not (source / "config.json").is_file():
        raise ConfigError(f"{source} is no checkpoint folder: it holds no config.json")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty: choose another DST")
    if target.resolve() == source.resolve():
        raise ConfigError("SRC and DST are the same folder: choose another DST")


def _described(transformers: Any, source: Path) -> tuple[Any, Any, Names]:
    """Configuration, tokenizer, and the names of the matrices to change."""
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"{source} cannot be read as a causal language model: {why}") from None
    model.tie_weights()
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None:
        raise ConfigError(f"{type(model).__name__} has no output embeddings")
    parameters = list(model.named_parameters(remove_duplicate=False))

    def called(wanted: Any) -> tuple[str, ...]:
        return tuple(name for name, parameter in parameters if parameter is wanted)

    bias = getattr(outputs, "bias", None)
    return (
        config,
        tokenizer,
        Names(
            inputs=called(inputs.weight),
            outputs=called(outputs.weight),
            bias=() if bias is None else called(bias),
            tied=outputs.weight is inputs.weight,
            prefix=model.base_model_prefix,
        ),
    )


def _related(tokenizer: Any) -> dict[str, list[int]]:
    """Marker to the ids of the pieces of its words."""
    known = tokenizer.get_vocab()
    if present := [marker for marker in MARKERS if marker in known]:
        if len(present) == len(MARKERS):
            raise ConfigError("SRC has the four marker tokens already: nothing to do")
        missing = [marker for marker in MARKERS if marker not in known]
        raise ConfigError(
            f"SRC has {', '.join(present)} but not {', '.join(missing)}: start from a checkpoint "
            "that has none of them"
        )
    related = {}
    for marker in MARKERS:
        words = marker.strip("<|>").replace("_", " ")
        tokens = list(tokenizer.encode(words, add_special_tokens=False))
        related[marker] = [token for token in tokens if token != tokenizer.unk_token_id]
        if not related[marker]:
            raise DataError(f"the tokenizer knows no piece of {words!r}: nothing to average")
    return related


def _add_markers(tokenizer: Any) -> dict[str, int]:
    """The new ids. The tokens are not "special", as `<think>` is not: a decoder must show them."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [AddedToken(marker, normalized=False, special=False) for marker in MARKERS]
    )
    ids = {marker: int(tokenizer.convert_tokens_to_ids(marker)) for marker in MARKERS}
    for marker, token in ids.items():
        if list(tokenizer.encode(f"a{marker}b", add_special_tokens=False)).count(token) != 1:
            raise ConfigError(f"this tokenizer cannot hold {marker} as one token")
    return ids


def _new_rows(
    checkpoint: Checkpoint,
    ids: dict[str, int],
    related: dict[str, list[int]],
    seed: int,
    noise: float,
) -> dict[str, dict[int, bytes]]:
    """Tensor name to row number to bytes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, dict[int, bytes]] = {}
    for role, matrices in checkpoint.roles.items():
        # Of several stored copies of a tied matrix the first counts.
        means = {m: _mean(matrices[0], related[m]) for m in ids} if matrices else {}
        scale = 0.0 if role == "bias" else noise
        drawn = {
            m: torch.randn(mean.shape, generator=generator) * scale for m, mean in means.items()
        }
        for place in matrices:
            dtype = getattr(torch, FLOATS[place.dtype])
            changes[place.name] = {
                ids[m]: (mean + drawn[m]).to(dtype).view(torch.uint8).numpy().tobytes()
                for m, mean in means.items()
            }
    return changes


def _mean(place: Matrix, tokens: Sequence[int]) -> Any:
    import torch

    dtype = getattr(torch, FLOATS[place.dtype])
    rows = [torch.frombuffer(bytearray(read_row(place, token)), dtype=dtype) for token in tokens]
    return torch.stack(rows).to(torch.float32).mean(dim=0)


def _write_config(source: Path, folder: Path, config: Any, rows: int, after: int) -> None:
    """The configuration as it is in the file, with the new size."""
    if after == rows:
        return
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    inner = config.get_text_config()
    part = raw if inner is config else raw.get(inner_name(config, inner), raw)
    part["vocab_size"] = after
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def inner_name(config: Any, inner: Any) -> str:
    """The key under which a composite configuration holds that of its text model."""
    return next((name for name in config.sub_configs if getattr(config, name) is inner), "")


def _copy_others(source: Path, folder: Path) -> None:
    """Files that are no weights: configuration, licence, code. The tokenizer is saved over its."""
    for file in sorted(source.iterdir()):
        weights = file.name.endswith(_NOT_COPIED) or file.name.endswith(_INDEX)
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end, or goes away."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as data:
                    os.fsync(data.fileno())
        folder.chmod(target.parent.stat().st_mode & 0o777)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _markup_notes(tokenizer: Any, chat: str) -> Iterator[str]:
    unknown = (None, tokenizer.unk_token_id)
    if IM_START in chat and tokenizer.convert_tokens_to_ids(IM_START) in unknown:
        yield (
            f"note: the chat template uses {IM_START}, which is not one token of this tokenizer: "
            "give --chat-template a file with the model's own markup, and serve with "
            "--memento-require-assistant-section false"
        )


def _reading_notes(tokenizer: Any, source: Path) -> Iterator[str]:
    """transformers may rebuild a tokenizer by the rules of its class, whatever the file says."""
    from tokenizers import Tokenizer

    if (file := source / "tokenizer.json").is_file():
        plain = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
        if list(plain) != list(tokenizer.encode(_PROBE, add_special_tokens=False)):
            yield (
                f"note: transformers reads this tokenizer as {type(tokenizer).__name__}, which "
                f"cuts text differently from {file}: the new checkpoint has what transformers read"
            )
