"""`memento init-model`: what a served Memento model needs, for a Hugging Face checkpoint.

The tokens are the four markers, the tags of a thought, and those of the chat template's turns;
those that the tokenizer has stay. A new row is the mean of the rows of related tokens plus noise
N(0, 0.01) (paper, A.2.1; 0.01 is the standard deviation). Related to `<|block_start|>` are the
tokens into which the tokenizer cuts the words of its name, here the text "block start", without the
leading space that they would have inside a sentence; a piece that occurs twice counts twice,
unknown-token pieces are left out. Input and untied output rows are made alike, each from its own
matrix; tied ones share the input's. An output bias gets the mean without noise.

Rows that the checkpoint keeps beyond its tokenizer (padding of the vocabulary) are used before the
matrix is lengthened. Nothing else changes, bit for bit, and no weights are loaded: the names of the
matrices come from the model on the meta device, the rows from the files (see `weights`).
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

from memento_pipeline.checkpoint import tokenizer as tokens
from memento_pipeline.checkpoint.files import Checkpoint, Names, open_checkpoint
from memento_pipeline.checkpoint.weights import FLOATS, Matrix, read_row
from memento_pipeline.output.chat import ChatTemplate, load_template
from memento_sgl.errors import ConfigError, DataError
from memento_sgl.offline.inputs.tokens import TextTokenizer
from memento_sgl.rule.config import DELIMITERS_KEY, MementoConfig
from memento_sgl.rule.markup import resolve_checked

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_INDEX = ".index.json"


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
    mask_delimiters: bool | None = None,
    seed: int = 0,
    noise: float = 0.01,
) -> Initialised:
    """Write `source` with all that `memento serve` asks for to `target`.

    Args:
        template: chat template to save with the tokenizer: of this project by name, or a file or
            checkpoint folder that has one.
        mask_delimiters: whether the model will be trained to evict the block's two markers too;
            None: by its family, else not. Written into config.json where the family does not tell.
        noise: standard deviation.

    Raises:
        ConfigError: torch or transformers is missing, `target` is not empty, `source` is no causal
            language model, or has some or all of the tokens already.
        MarkerError: the template's turns cannot be told by tokens.
        DataError: a tokenizer that loses text, or weights that are damaged, quantised, or do not
            fit it.
    """
    transformers = _transformers()
    _check_folders(source, target)
    chat = load_template(template, source)
    config, names = _described(transformers, source)
    with _new_folder(target) as folder:
        _copy_others(source, folder)
        _make_fast(transformers, source, folder)
        tokenizer = tokens.load(folder)
        added = tokens.add_tokens(tokenizer, chat.source)
        ids = added.ids
        notes = tokens.write(tokenizer, folder, chat.source, added)
        turn_end = _check_served(chat, folder)
        checkpoint = open_checkpoint(source, folder, names)
        rows = checkpoint.rows
        if rows < added.before:
            raise DataError(f"{added.before} tokens in the tokenizer, but only {rows} embeddings")
        changes = _new_rows(checkpoint, ids, added.related, seed, noise)
        after = max(rows, *(token + 1 for token in ids.values()))
        if sorted(token for token in ids.values() if token >= rows) != list(range(rows, after)):
            raise DataError(f"the tokenizer's new ids {ids} leave a gap after {rows} embeddings")
        checkpoint.write(folder, changes)
        recorded = _delimiters(config, mask_delimiters)
        _write_config(folder, config, rows, after, recorded)
        _end_at(folder, config, turn_end)
    if recorded is not None:
        stay = "are evicted with their block" if recorded else "stay visible"
        notes += (f"note: config.json says that a block's markers {stay}: train and serve so",)
    return Initialised(ids, added.pieces, rows, after, names.tied, notes)


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


def _described(transformers: Any, source: Path) -> tuple[Any, Names]:
    """Configuration, and the names of the matrices to change."""
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
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
        Names(
            inputs=called(inputs.weight),
            outputs=called(outputs.weight),
            bias=() if bias is None else called(bias),
            tied=outputs.weight is inputs.weight,
            prefix=model.base_model_prefix,
        ),
    )


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


def _make_fast(transformers: Any, source: Path, folder: Path) -> None:
    """Where `source` has no tokenizer.json, have transformers make one from its other files."""
    if (folder / tokens.FILE).is_file():
        return
    try:
        read = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{source} has no tokenizer that can be read: {why}") from None
    read.save_pretrained(folder)
    if not (folder / tokens.FILE).is_file():
        raise ConfigError(f"{source} has no {tokens.FILE}, and {type(read).__name__} writes none")


def _check_served(chat: ChatTemplate, folder: Path) -> int | None:
    """Raise where `memento serve` would refuse the tokenizer; returns what ends a turn."""
    tokenizer = TextTokenizer(folder)
    config, markup = chat.settle(MementoConfig(constrain="strict"), tokenizer.added)
    return resolve_checked(config, markup, tokenizer).im_end


def _delimiters(config: Any, said: bool | None) -> bool | None:
    """What config.json must say about the block's markers; None: the family tells."""
    try:
        known = MementoConfig().for_family(list(config.architectures or ())).mask_delimiters
    except ConfigError:
        return bool(said)
    return None if said in (None, known) else said


def _end_at(folder: Path, config: Any, turn_end: int | None) -> None:
    """Let generation end where the template's turns end, as well as where it did."""
    file = folder / "generation_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    given = raw.get("eos_token_id", config.get_text_config().eos_token_id)
    ends = given if isinstance(given, list) else [given]
    ends = [token for token in ends if token is not None]
    if turn_end is None or turn_end in ends:
        return
    raw["eos_token_id"] = [turn_end, *ends]
    file.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, config: Any, rows: int, after: int, recorded: bool | None) -> None:
    """The configuration as it is in the file, with the new size and what serving must know."""
    if after == rows and recorded is None:
        return
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inner = config.get_text_config()
    part = raw if inner is config else raw.get(inner_name(config, inner), raw)
    if after != rows:
        part["vocab_size"] = after
    if recorded is not None:
        raw[DELIMITERS_KEY] = recorded
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
