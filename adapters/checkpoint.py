"""VB-LoRA checkpoints in memory: compact (TopKCheckpoint) and with full logits (LogitsCheckpoint), either to the other.

Reading is strict: PEFT 0.21 loads NaN banks, weights outside [0, 1] and repeated indices without complaint; here each
is an error that names its tensor. A compact checkpoint stays compact: its selections are packed into two tensors, so
that it takes in memory what it takes on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters import compose
from adapters.config import VBLoRAConfig
from adapters.errors import BadIndex, BadWeights, InvalidSafetensors, NonFinite
from adapters.layout import BANK_KEY, AdapterLayout, logits_key, read_layout
from adapters.parameters import Storage, index_width
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.targets import LayerShape, check_tiling
from adapters.vector_bank import VectorBank

_INDEX_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}

# In a batch every row meets every adapter's factors, and what is not its own is multiplied by 0: products of one
# adapter's bank and another row's activations must be finite. Trained banks hold numbers below 1.
LARGEST_IN_BANK = 1e15

ReadTensor = Callable[[str], Tensor]


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

    def factors(self) -> Iterator[tuple[LayerShape, Tensor, Tensor]]:
        """Each layer with A [r, in] and Bᵀ [r, out], float32: the fast path, one composition for the whole adapter."""
        tiles = compose.mixtures(self.indices, self.full_weights(), self.bank.vectors)
        for layer, rows_a, rows_b in self.layout.spans():
            a = compose.factor_a(tiles[rows_a], self.config.r)
            yield layer, a, compose.factor_b_transposed(tiles[rows_b], self.config.r)

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
        indices = torch.cat([indices for indices, _ in chosen]).to(_index_dtype(self.config))
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
    """The checkpoint in a PEFT adapter directory, every tensor checked.

    Raises a CheckpointError that names the file, the field or the tensor at fault.
    """
    layout = read_layout(directory)
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            # Copies: what the library returns are views of the mapped file, which change or vanish with it.
            return _read_tensors(layout, lambda key: file.get_tensor(key).clone())
    except SafetensorError as error:
        raise InvalidSafetensors(f"the weights cannot be read: {error}", subject=WEIGHTS_FILE) from error


def _read_tensors(layout: AdapterLayout, read: ReadTensor) -> TopKCheckpoint | LogitsCheckpoint:
    bank = VectorBank(_checked_bank(read(BANK_KEY)))
    extras = {spec.key: _finite(spec.key, read(spec.key)) for spec in layout.extras}
    keys = [logits_key(layer.name, side) for layer in layout.layers for side in ("A", "B")]
    if layout.storage is Storage.LOGITS:
        sides = [_checked_logits(key, read(key)) for key in keys]
        pairs = zip(sides[::2], sides[1::2], strict=True)
        names = (layer.name for layer in layout.layers)
        return LogitsCheckpoint(layout, bank, dict(zip(names, pairs, strict=True)), extras)
    config = layout.config
    indices = [_checked_indices(key, read(key), config) for key in (f"{key}_topk_indices" for key in keys)]
    weights = [_checked_weights(key, read(key), config) for key in (f"{key}_topk_weights" for key in keys)]
    # Tensors may differ in dtype; the packed one takes the narrowest that holds them all.
    dtype = weights[0].dtype
    for tensor in weights:
        dtype = torch.promote_types(dtype, tensor.dtype)
    packed = torch.cat([tensor.to(dtype) for tensor in weights])
    return TopKCheckpoint(layout, bank, torch.cat(indices), packed, extras)


def _finite(key: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise NonFinite(f"{key} contains NaN or infinity; was the training run healthy?", subject=key)
    return tensor


def _checked_bank(vectors: Tensor) -> Tensor:
    """Finite, and so small that its products stay finite: infinity would become NaN in other rows of its batch."""
    _finite(BANK_KEY, vectors)
    if bool((vectors.abs() > LARGEST_IN_BANK).any()):
        raise NonFinite(f"{BANK_KEY} holds numbers beyond {LARGEST_IN_BANK:g}; was the run healthy?", subject=BANK_KEY)
    return vectors


def _checked_logits(key: str, logits: Tensor) -> Tensor:
    """Logits may be -inf (the vector is never chosen), but not NaN or +inf, and some vector must be choosable."""
    if bool(logits.isnan().any()) or bool(logits.isposinf().any()):
        raise NonFinite(f"{key} contains NaN or +inf; was the training run healthy?", subject=key)
    if bool(logits.isneginf().all(-1).any()):
        raise NonFinite(f"{key} has a position whose logits are all -inf, so that no vector can be chosen", subject=key)
    return logits


def _checked_indices(key: str, indices: Tensor, config: VBLoRAConfig) -> Tensor:
    """[positions, topk] in PEFT's dtype. In range and distinct within each position, or BadIndex."""
    wide = indices.to(torch.int64).flatten(0, 1)
    if bool(((wide < 0) | (wide >= config.num_vectors)).any()):
        raise BadIndex(
            f"{key} holds an index outside the bank of {config.num_vectors} vectors (0 to {config.num_vectors - 1})",
            subject=key,
        )
    ordered = wide.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise BadIndex(f"{key} chooses the same vector twice in one position", subject=key)
    return wide.to(_index_dtype(config))


def _checked_weights(key: str, weights: Tensor, config: VBLoRAConfig) -> Tensor:
    """[positions, topk - 1]. Each in [0, 1] and no sum above 1 by more than rounding, or BadWeights."""
    _finite(key, weights)
    flat = weights.flatten(0, 1)
    if bool(((flat < 0) | (flat > 1)).any()):
        raise BadWeights(f"{key} holds a weight outside [0, 1]", subject=key)
    # A softmax rounded to its storage dtype can sum to a little more than 1.
    allowed = 1.0 + config.topk * torch.finfo(flat.dtype).eps
    sums = flat.double().sum(-1)
    if bool((sums > allowed).any()):
        raise BadWeights(
            f"{key} holds weights that sum to {float(sums.max()):.6g}; the stored topk - 1 weights must leave a "
            "remainder of at least 0",
            subject=key,
        )
    return flat


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


def _index_dtype(config: VBLoRAConfig) -> torch.dtype:
    return _INDEX_DTYPES[index_width(config.num_vectors).dtype]


def _with_storage(layout: AdapterLayout, storage: Storage) -> AdapterLayout:
    config = replace(layout.config, save_only_topk_weights=storage is Storage.TOPK)
    return replace(layout, config=config, storage=storage)


def _unflatten_a(rows: Tensor, config: VBLoRAConfig) -> Tensor:
    return rows.reshape(config.r, len(rows) // config.r, rows.shape[-1])  # [r, in_tiles, depth]


def _unflatten_b(rows: Tensor, config: VBLoRAConfig) -> Tensor:
    return rows.reshape(len(rows) // config.r, config.r, rows.shape[-1])  # [out_tiles, r, depth]
