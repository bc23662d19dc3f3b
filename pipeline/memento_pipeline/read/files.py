"""Which files a run reads: those that are named, and of folders the data files of one split.

A folder may hold more than input. Left out, and said in the log: what this run writes, the work
folders of other runs, and files of other splits. Of a work folder that is named itself one table is
read, `WORK_ROWS`: the others say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from memento_pipeline.read.splits import ALL, DEFAULT, split_of
from memento_sgl.errors import ConfigError
from memento_sgl.offline.inputs.rows import JSON, LINES, TABLES, named_like

log = logging.getLogger(__name__)

SUFFIXES = (*LINES, *JSON, *TABLES)
STORE = "store.sqlite"  # what makes a folder a work folder
WORK_ROWS = "default/train.jsonl"
ROW_FOLDERS = ("default", "full", "chat", "messages", "tokenized")
OUTPUTS = (*ROW_FOLDERS, "extras", "shards", "rejected.jsonl", "log.jsonl", "stats.json")
_METADATA = (  # of dataset folders and checkpoints
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


def list_files(
    paths: Sequence[Path], *, split: str | None = None, out: Path | None = None
) -> list[Path]:
    """The data files that `paths` name or hold, folders in the order of their file names.

    Args:
        split: of folders; None: train, `all`: every one.
        out: the folder that the run writes to.

    Raises:
        ConfigError: a path is missing, of an unknown kind, or a folder without such files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _in_folder(path, split, out)
        elif not path.is_file():
            raise ConfigError(f"no such file or folder: {path}")
        elif not named_like(path, SUFFIXES):
            raise ConfigError(f"{path}: not one of the known kinds {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def data_files(folder: Path) -> list[Path]:
    """All data files of a folder, whatever wrote them.

    Raises:
        ConfigError: there are none.
    """
    found = sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)))
    if not (found := [file for file in found if file.is_file()]):
        raise ConfigError(f"{folder} holds no {', '.join(SUFFIXES)} file")
    return found


def _in_folder(folder: Path, split: str | None, out: Path | None) -> list[Path]:
    own = out is not None and folder.resolve() == out.resolve()
    if (folder / STORE).is_file() and not own:
        if not (rows := folder / WORK_ROWS).is_file():
            raise ConfigError(f"{folder} is a work folder without {WORK_ROWS}: finish its run")
        log.info("input is a work folder: one table is read", extra={"file": str(rows)})
        return [rows]
    found = data_files(folder)
    raw = [file for file in found if not _written(file, folder, out)]
    if len(raw) < len(found):
        log.info("output of runs is no input", extra={"left_out": len(found) - len(raw)})
    if not raw:
        raise ConfigError(f"{folder} holds only what `memento convert` wrote: name the input")
    return _of_split(folder, raw, split)


def _of_split(folder: Path, files: Sequence[Path], wanted: str | None) -> list[Path]:
    """Files of the wanted split. One whose name tells none is of the default split."""
    splits = {file: split_of(file.relative_to(folder)) or DEFAULT for file in files}
    there = sorted(set(splits.values()))
    if wanted is None:
        wanted = there[0] if len(there) == 1 else DEFAULT
    if wanted != ALL and wanted not in there:
        raise ConfigError(
            f"{folder} has no split {wanted!r} but {', '.join(there)}: choose one with --split, "
            f"or --split {ALL}"
        )
    chosen = [file for file in files if wanted in (ALL, splits[file])]
    if there != [DEFAULT]:
        others = [name for name in there if wanted not in (ALL, name)]
        about = {"folder": str(folder), "split": wanted, "left_out": others}
        log.info("reading one split", extra=about)
    return chosen


def _is_data(file: Path) -> bool:
    if any(part.startswith((".", "cache-")) for part in file.parts):
        return False
    return named_like(file, SUFFIXES) and file.name.lower() not in _METADATA


def _written(file: Path, folder: Path, out: Path | None) -> bool:
    """Whether this run or another one wrote the file. In a folder that is both input and output
    only what the run itself writes counts."""
    for parent in _parents(file, folder):
        if (parent / STORE).is_file() and not (out and parent.resolve() == out.resolve()):
            return parent != folder or file.relative_to(parent).parts[0] in OUTPUTS
    if out is None or not file.resolve().is_relative_to(out.resolve()):
        return False
    if out.resolve() != folder.resolve() and out.resolve().is_relative_to(folder.resolve()):
        return True
    return file.resolve().relative_to(out.resolve()).parts[0] in OUTPUTS


def _parents(file: Path, folder: Path) -> Iterable[Path]:
    """The folders from the file's own up to `folder`."""
    for parent in file.parents:
        yield parent
        if parent == folder:
            return
