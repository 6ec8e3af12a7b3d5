"""The weights of a Hugging Face model directory, read one tensor at a time and written shard by shard.

A model is larger than the memory that handles it: nothing here holds more than one tensor.
Format: `model-00001-of-0000N.safetensors` and an index that says which holds which tensor, or one `model.safetensors`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import InvalidSafetensors, MissingTensor, UnsupportedCheckpoint
from adapters.safetensors_header import DTYPE_BYTES, TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class ShardedWeights:
    """The tensors of a model directory, by key.

    No file stays open: the pages of a mapped file that were read count as the process's memory until it is unmapped.
    """

    def __init__(self, directory: Path) -> None:
        """Raises UnsupportedCheckpoint without safetensors, InvalidSafetensors or MissingTensor for damaged files."""
        self._files: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        for path in _weight_files(directory):
            for spec in _specs_in(path):
                self._files[spec.key], self.specs[spec.key] = path, spec

    def read(self, key: str) -> Tensor:
        """One tensor, on the host; it may be a view of the mapped file."""
        with safe_open(self._files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


def spec_bytes(spec: TensorSpec) -> int:
    return spec.elements * DTYPE_BYTES[spec.dtype]


def write_shards(
    directory: Path, specs: Iterable[TensorSpec], produce: Callable[[TensorSpec], Tensor], shard_bytes: int
) -> list[Path]:
    """Writes the tensors that `specs` announce, each as `produce` makes it, in files of at most `shard_bytes`.

    A tensor that is larger has a file of its own. Returns the files; the index lies beside them.
    """
    shards = _split(specs, shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, produce)
        weight_map.update(dict.fromkeys((spec.key for spec in shard), name))
    total = sum(spec_bytes(spec) for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers would read."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UnsupportedCheckpoint(
            f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}; weights in other formats "
            "(pytorch_model.bin, GGUF) are not read: save the model with save_pretrained first",
            subject=SINGLE_FILE,
        )
    paths = [directory / name for name in sorted(set(_weight_map(index).values()))]
    for path in paths:
        if path.parent != directory or not path.is_file():
            raise MissingTensor(f"{INDEX_FILE} names {path.name!r}, which is not in {directory}", subject=path.name)
    return paths


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidSafetensors(f"{index} has no weight_map that can be read", subject=INDEX_FILE) from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidSafetensors(f"the weight_map of {index} does not map tensors to files", subject=INDEX_FILE)
    return weight_map


def _specs_in(path: Path) -> list[TensorSpec]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = [(key, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118 - not a dict
            specs = [TensorSpec(key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices]
    except SafetensorError as error:
        raise InvalidSafetensors(f"{path} cannot be read, copy it anew: {error}", subject=path.name) from error
    for spec in specs:
        if spec.dtype not in DTYPE_BYTES:
            raise UnsupportedCheckpoint(
                f"{path} holds {spec.key!r} as {spec.dtype}: weights that are quantized cannot be read; use the base "
                "that they were made from",
                subject=spec.key,
            )
    return specs


def _split(specs: Iterable[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Runs of tensors that fit a shard. In each, wide dtypes come first, so that every tensor lies aligned."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec_bytes(spec) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec_bytes(spec)
    return [sorted(shard, key=lambda spec: -DTYPE_BYTES[spec.dtype]) for shard in shards]


def _write_file(path: Path, specs: Sequence[TensorSpec], produce: Callable[[TensorSpec], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec_bytes(spec)
        header[spec.key] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            tensor = produce(spec)
            assert (tuple(tensor.shape), tensor.nbytes) == (spec.shape, spec_bytes(spec)), f"not as announced: {spec}"
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
