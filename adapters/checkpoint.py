"""VB-LoRA checkpoints in memory: compact (TopKCheckpoint) and with full logits (LogitsCheckpoint), either to the other.

Reading is strict: PEFT 0.21 loads NaN banks, weights outside [0, 1] and repeated indices without complaint; here each
is an error that names its tensor. A compact checkpoint stays compact: its selections are packed into two tensors, so
that it takes in memory what it takes on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapters import compose
from adapters.config import VBLoRAConfig
from adapters.errors import BadIndex, BadWeights, CheckpointError, NonFinite
from adapters.layout import BANK_KEY, AdapterLayout, logits_key, read_layout
from adapters.parameters import Storage, index_width
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.targets import LayerShape, check_tiling
from adapters.tensor_file import ReadTensor, bounded, finite, tensors_in
from adapters.vector_bank import VectorBank

_INDEX_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}

_CHECKED_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True, slots=True, eq=False)
class TopKCheckpoint:
    """A compact adapter: for every position, the indices of k bank vectors and the first k - 1 of their weights.

    `indices` [positions, topk] in PEFT's integer dtype for the bank; `weights` [positions, topk - 1], float; both
    packed in the order of `layout.spans()`. `extras` are the trained biases and saved modules, by checkpoint key.
    """

    layout: AdapterLayout
    bank: VectorBank
    indices: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> VBLoRAConfig:
        return self.layout.config

    @property
    def nbytes(self) -> int:
        """Bytes that the adapter holds in memory: its bank, its selections and its extras."""
        return sum(t.nbytes for t in (self.bank.vectors, self.indices, self.weights, *self.extras.values()))

    def full_weights(self) -> Tensor:
        """All k weights of each position, [positions, topk] float32, the last one being the remainder."""
        return compose.remainder_weights(self.weights)

    def factors(self, device: torch.device | None = None) -> Iterator[tuple[LayerShape, Tensor, Tensor]]:
        """Each layer with A [r, in] and Bᵀ [r, out], float32: the fast path.

        The whole adapter is composed at once, on `device`; its factors are views of one tensor and fill it.
        """
        r, length = self.config.r, self.config.vector_length
        layers = tuple((layer.in_features // length, layer.out_features // length) for layer in self.layout.layers)
        order = compose.factor_order(r, layers)
        indices, weights = self.indices[order].to(device), self.full_weights()[order].to(device)
        tiles = compose.mixtures(indices, weights, self.bank.vectors.to(device))
        for layer, rows_a, rows_b in self.layout.spans():
            yield layer, tiles[rows_a].view(r, -1), tiles[rows_b].view(r, -1)

    def to_logits(self) -> LogitsCheckpoint:
        """The same adapter with full logits, float32: -inf at every vector that was not chosen.

        It is for inference and merging; training cannot resume from it (PEFT raises on the infinities).
        """
        full = compose.reconstruct_logits(self.indices, self.full_weights(), self.config.num_vectors)
        logits = {}
        for layer, rows_a, rows_b in self.layout.spans():
            logits[layer.name] = (_unflatten_a(full[rows_a], self.config), _unflatten_b(full[rows_b], self.config))
        return LogitsCheckpoint(_with_storage(self.layout, Storage.LOGITS), self.bank, logits, self.extras)

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's keys and shapes. Weights are written in float32: PEFT loads compact checkpoints in no other."""
        tensors = {BANK_KEY: self.bank.vectors, **self.extras}
        weights = lower_to_sum_of_one(self.full_weights()[:, :-1])
        for layer, rows_a, rows_b in self.layout.spans():
            for side, rows, unflatten in (("A", rows_a, _unflatten_a), ("B", rows_b, _unflatten_b)):
                key = logits_key(layer.name, side)
                tensors[f"{key}_topk_indices"] = unflatten(self.indices[rows], self.config)
                tensors[f"{key}_topk_weights"] = unflatten(weights[rows], self.config)
        return tensors


@dataclass(frozen=True, slots=True, eq=False)
class LogitsCheckpoint:
    """An adapter with a logit for every bank vector: what training writes and can resume from.

    `logits` maps a module name to logits_A [r, in_tiles, num_vectors] and logits_B [out_tiles, r, num_vectors].
    """

    layout: AdapterLayout
    bank: VectorBank
    logits: Mapping[str, tuple[Tensor, Tensor]]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initialise(
        cls, config: VBLoRAConfig, layers: Sequence[LayerShape], generator: torch.Generator | None = None
    ) -> LogitsCheckpoint:
        """A fresh adapter for training: a uniform bank and normal logits, float32, as PEFT initialises them.

        Raises ShapeMismatch when vector_length does not divide the features of a layer.
        """
        layout = AdapterLayout(replace(config, save_only_topk_weights=False), Storage.LOGITS, tuple(layers))
        bank = VectorBank.uniform(
            config.num_vectors, config.vector_length, bound=config.init_vector_bank_bound, generator=generator
        )
        logits = {}
        for layer in layers:
            check_tiling(layer, config.vector_length)
            in_tiles = layer.in_features // config.vector_length
            out_tiles = layer.out_features // config.vector_length
            shapes = (config.r, in_tiles, config.num_vectors), (out_tiles, config.r, config.num_vectors)
            a, b = (torch.empty(shape).normal_(0, config.init_logits_std, generator=generator) for shape in shapes)
            logits[layer.name] = (a, b)
        return cls(layout, bank, logits)

    @property
    def config(self) -> VBLoRAConfig:
        return self.layout.config

    @property
    def resumable(self) -> bool:
        """Whether training can go on from here: an infinite logit says that the adapter once was compact."""
        return all(bool(side.isfinite().all()) for pair in self.logits.values() for side in pair)

    def to_topk(self) -> TopKCheckpoint:
        """The same adapter compact, weights in float32: its best `topk` vectors of each position and their softmax."""
        chosen = [
            compose.select_topk(side.reshape(-1, self.config.num_vectors), self.config.topk)
            for layer in self.layout.layers
            for side in self.logits[layer.name]
        ]
        indices = torch.cat([indices for indices, _ in chosen]).to(index_dtype(self.config))
        weights = lower_to_sum_of_one(torch.cat([weights for _, weights in chosen])[:, :-1])
        return TopKCheckpoint(_with_storage(self.layout, Storage.TOPK), self.bank, indices, weights, self.extras)

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's keys and shapes."""
        tensors = {BANK_KEY: self.bank.vectors, **self.extras}
        for module, (logits_a, logits_b) in self.logits.items():
            tensors[logits_key(module, "A")] = logits_a
            tensors[logits_key(module, "B")] = logits_b
        return tensors


def read_checkpoint(directory: Path) -> TopKCheckpoint | LogitsCheckpoint:
    """The VB-LoRA checkpoint in a PEFT adapter directory, every tensor checked.

    Raises a CheckpointError that names the file, the field or the tensor at fault.
    """
    layout = read_layout(directory)
    with tensors_in(directory) as read:
        return _READERS[layout.storage](layout, read)


# What `read` returns may be a view of the mapped file, which changes or vanishes with it, so it is copied before it is
# checked. A compact adapter's small tensors are packed first, and checked all at once.


def _read_topk(layout: AdapterLayout, read: ReadTensor) -> TopKCheckpoint:
    config = layout.config
    keys = [logits_key(layer.name, side) for layer in layout.layers for side in ("A", "B")]
    indices = _packed([f"{key}_topk_indices" for key in keys], lambda key: _signed(read(key)))
    weights = _packed([f"{key}_topk_weights" for key in keys], read)
    _check_packed(indices, partial(_check_indices, num_vectors=config.num_vectors))
    _check_packed(weights, partial(_check_weights, topk=config.topk))
    bank, extras = _read_others(layout, read)  # at last: dropped where others have the bank, it leaves no hole behind
    return TopKCheckpoint(layout, bank, indices.tensor.to(index_dtype(config)), weights.tensor, extras)


def _read_logits(layout: AdapterLayout, read: ReadTensor) -> LogitsCheckpoint:
    bank, extras = _read_others(layout, read)
    logits = {}
    for layer in layout.layers:
        a, b = (_checked_logits(key, read(key).clone()) for key in (logits_key(layer.name, side) for side in "AB"))
        logits[layer.name] = a, b
    return LogitsCheckpoint(layout, bank, logits, extras)


_READERS: Mapping[Storage, Callable[[AdapterLayout, ReadTensor], TopKCheckpoint | LogitsCheckpoint]] = {
    Storage.TOPK: _read_topk,
    Storage.LOGITS: _read_logits,
}


def _read_others(layout: AdapterLayout, read: ReadTensor) -> tuple[VectorBank, dict[str, Tensor]]:
    extras = {spec.key: finite(spec.key, read(spec.key).clone()) for spec in layout.extras}
    return VectorBank(bounded(BANK_KEY, read(BANK_KEY).clone())), extras


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """Tensors of the file one after the other in one, [positions, depth]. `parts` are (key, positions, dtype) of each.

    Tensors may differ in dtype; the packed one has the narrowest that holds them all.
    """

    tensor: Tensor
    parts: Sequence[tuple[str, int, torch.dtype]]


def _packed(keys: Sequence[str], read: ReadTensor) -> _Packed:
    tensors = [read(key).flatten(0, 1) for key in keys]
    parts = [(key, len(tensor), tensor.dtype) for key, tensor in zip(keys, tensors, strict=True)]
    return _Packed(torch.cat(tensors), parts)


def _check_packed(packed: _Packed, check: Callable[[str, Tensor], None]) -> None:
    """Runs a check of positions over everything at once, and part by part only to name the one at fault.

    A part in a narrower dtype than the whole may also pass where the whole did not: rounding allows it more.
    """
    try:
        check(WEIGHTS_FILE, packed.tensor)
    except CheckpointError:
        tensors = torch.split(packed.tensor, [positions for _, positions, _ in packed.parts])
        for (key, _, dtype), tensor in zip(packed.parts, tensors, strict=True):
            check(key, tensor.to(dtype))


def _checked_logits(key: str, logits: Tensor) -> Tensor:
    """Logits may be -inf (the vector is never chosen), but not NaN or +inf, and some vector must be choosable."""
    if bool(logits.isnan().any()) or bool(logits.isposinf().any()):
        raise NonFinite(f"{key} contains NaN or +inf; was the training run healthy?", subject=key)
    if bool(logits.isneginf().all(-1).any()):
        raise NonFinite(f"{key} has a position whose logits are all -inf, so that no vector can be chosen", subject=key)
    return logits


def _signed(indices: Tensor) -> Tensor:
    """In a type that PyTorch computes with. What an int64 cannot hold becomes negative, and is refused as such."""
    return indices.to(torch.int64) if indices.dtype in (torch.uint16, torch.uint32, torch.uint64) else indices


def _check_indices(key: str, indices: Tensor, num_vectors: int) -> None:
    """Indices [positions, topk] in range and distinct within each position, or BadIndex."""
    for some in _in_pieces(indices):
        if bool(((some < 0) | (some.long() >= num_vectors)).any()):
            raise BadIndex(
                f"{key} holds an index outside the bank of {num_vectors} vectors (0 to {num_vectors - 1})",
                subject=key,
            )
        ordered = some.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise BadIndex(f"{key} chooses the same vector twice in one position", subject=key)


def _check_weights(key: str, weights: Tensor, topk: int) -> None:
    """Weights [positions, topk - 1], each in [0, 1] and no sum above 1 by more than rounding, or BadWeights."""
    # A softmax rounded to its storage dtype can sum to a little more than 1.
    allowed = 1.0 + topk * torch.finfo(weights.dtype).eps
    for some in _in_pieces(weights):
        finite(key, some)
        if bool(((some < 0) | (some > 1)).any()):
            raise BadWeights(f"{key} holds a weight outside [0, 1]", subject=key)
        sums = some.double().sum(-1)
        if bool((sums > allowed).any()):
            raise BadWeights(
                f"{key} holds weights that sum to {float(sums.max()):.6g}; the stored topk - 1 weights must leave a "
                "remainder of at least 0",
                subject=key,
            )


def _in_pieces(positions: Tensor) -> Sequence[Tensor]:
    """Some positions at a time: checks take several times the memory of what they look at."""
    return torch.split(positions, max(1, _CHECKED_AT_ONCE // max(1, positions.shape[-1])))


def lower_to_sum_of_one(weights: Tensor) -> Tensor:
    """Weights [positions, topk - 1] whose float32 sums are at most 1, so that PEFT loads what we write.

    PEFT takes the log of `1 - sum` and answers NaN where rounding made it negative. The largest weight of such a
    position is lowered by the smallest step, as often as it takes.
    """
    weights = weights.clone()
    while weights.shape[-1] and len(over := (weights.float().sum(-1) > 1).nonzero().flatten()):
        largest = weights[over].argmax(-1)
        lowered = torch.nextafter(weights[over, largest], torch.zeros((), dtype=weights.dtype))
        weights[over, largest] = lowered
    return weights


def index_dtype(config: VBLoRAConfig) -> torch.dtype:
    return _INDEX_DTYPES[index_width(config.num_vectors).dtype]


def _with_storage(layout: AdapterLayout, storage: Storage) -> AdapterLayout:
    config = replace(layout.config, save_only_topk_weights=storage is Storage.TOPK)
    return replace(layout, config=config, storage=storage)


def _unflatten_a(rows: Tensor, config: VBLoRAConfig) -> Tensor:
    return rows.reshape(config.r, len(rows) // config.r, rows.shape[-1])  # [r, in_tiles, depth]


def _unflatten_b(rows: Tensor, config: VBLoRAConfig) -> Tensor:
    return rows.reshape(len(rows) // config.r, config.r, rows.shape[-1])  # [out_tiles, r, depth]
