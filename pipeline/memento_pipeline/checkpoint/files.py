"""The weight files of a checkpoint: one or many, safetensors or PyTorch pickles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

from memento_pipeline.checkpoint.weights import Header, Matrix, matrix, read_header, rewrite
from memento_sgl.errors import DataError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Names(NamedTuple):
    """Parameter names in the model, which may differ from those in the files by `prefix`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bias: tuple[str, ...]
    tied: bool
    prefix: str

    def stored(self, names: tuple[str, ...]) -> list[str]:
        """Names that a file may use for these parameters."""
        start = f"{self.prefix}."
        variants = [(name, name.removeprefix(start), start + name) for name in names]
        return list(dict.fromkeys(name for group in variants for name in group))


class Checkpoint:
    """Where the matrices of the vocabulary are.

    Attributes:
        roles: "input", "output" and "bias" to the tensors that hold them.
    """

    def __init__(self, files: list[Path], metadata: Mapping[str, Any], names: Names) -> None:
        self._metadata = metadata
        self._headers = {file: read_header(file) for file in files}
        inputs = self._find(names, names.inputs)
        # A tied parameter has both names in the model, so all its stored copies are inputs.
        outputs = [] if names.tied else self._find(names, names.outputs)
        self.roles = {"input": inputs, "output": outputs, "bias": self._find(names, names.bias)}
        if not inputs or not (outputs or names.tied):
            wanted = names.outputs if inputs else names.inputs
            raise DataError(f"the weight files hold no tensor {' or '.join(names.stored(wanted))}")
        sizes = {place.name: place.rows for places in self.roles.values() for place in places}
        if len(set(sizes.values())) != 1:
            raise DataError(f"the embeddings differ in their number of rows: {sizes}")
        self.rows = inputs[0].rows

    def _find(self, names: Names, wanted: tuple[str, ...]) -> list[Matrix]:
        return [
            matrix(file, header, name)
            for name in names.stored(wanted)
            for file, header in self._headers.items()
            if name in header.tensors
        ]

    def write(self, folder: Path, changes: Mapping[str, Mapping[int, bytes]]) -> None:
        """Write all weights to `folder`, with these rows in place."""
        written: dict[str, Header] = {}
        for file, header in self._headers.items():
            target = folder / file.name
            own = {name: rows for name, rows in changes.items() if name in header.tensors}
            if own:
                part = folder / f"{file.name}.part"
                rewrite(file, part, own)
                part.replace(target)
            elif file != target:
                shutil.copyfile(file, target)
            written[file.name] = read_header(target)
        if set(written) != {SINGLE}:
            index = self._index(written)
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _index(self, written: Mapping[str, Header]) -> dict[str, Any]:
        def count(headers: Mapping[Any, Header]) -> tuple[int, int]:
            tensors = [tensor for header in headers.values() for tensor in header.tensors.values()]
            offsets = [tensor["data_offsets"] for tensor in tensors]
            return sum(end - start for start, end in offsets), sum(map(_numbers, tensors))

        size, numbers = count(written)
        metadata = dict(self._metadata) | {"total_size": size}
        if "total_parameters" in metadata:  # tied ones may count once there: keep their way
            metadata["total_parameters"] += numbers - count(self._headers)[1]
        names = {name: file for file, header in written.items() for name in header.tensors}
        return {"metadata": metadata, "weight_map": dict(sorted(names.items()))}


def _numbers(tensor: Mapping[str, Any]) -> int:
    product = 1
    for size in tensor["shape"]:
        product *= size
    return product


def open_checkpoint(source: Path, work: Path, names: Names) -> Checkpoint:
    """Find the weights of `source`. Pickled ones are first written to `work` as safetensors.

    Raises:
        DataError: no weights, a shard is missing or damaged, or the embeddings are not in them.
    """
    for index_name, single in ((INDEX, SINGLE), (PICKLED_INDEX, PICKLED)):
        metadata: dict[str, Any] = {}
        if (source / index_name).is_file():
            index = json.loads((source / index_name).read_text(encoding="utf-8"))
            metadata = index.get("metadata") or {}
            files = [source / name for name in sorted(set(index["weight_map"].values()))]
        elif (source / single).is_file():
            files = [source / single]
        else:
            continue
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{source} lacks the weight files {', '.join(missing)}")
        if single == PICKLED:
            files = list(_unpickled(files, work))
        return Checkpoint(files, metadata, names)
    raise DataError(f"{source} holds no weights: neither {SINGLE} nor {PICKLED}, nor their index")


def _unpickled(files: list[Path], work: Path) -> Iterator[Path]:
    """PyTorch files as safetensors, one in memory at a time; only tensors are unpickled."""
    import torch
    from safetensors.torch import save_file

    for file in files:
        mapped = is_zipfile(file)  # older files cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        kept: dict[str, Any] = {}
        places: set[tuple[Any, ...]] = set()
        for name, tensor in state.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
            if tensor.numel() and place in places:
                continue  # the same memory under a second name: a tied weight
            places.add(place)
            kept[name] = tensor.contiguous()
        target = work / file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        save_file(kept, target, metadata={"format": "pt"})
        yield target
