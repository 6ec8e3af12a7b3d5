"""A base model with a selection folded in, written without ever being whole in memory.

What `adapters.merge` does to a loaded model, this does to files: every tensor is read, folded in float32, rounded once
and written. A weight that two modules share is written for each where the selection changes one of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.binding import check_layout, replaced_parameters
from adapters.errors import InvalidSelection
from adapters.factors import AdapterFactors, LayerFactors
from adapters.heads import ClassifierHead
from adapters.layers import AdaptedModel
from adapters.lora import ServedCheckpoint
from adapters.merge import FoldReport, Place, changed_places, replacing, stacked
from adapters.replacements import blended, origin
from adapters.safetensors_header import TensorSpec
from adapters.sharded import ShardedWeights, spec_bytes, write_shards
from adapters.targets import BaseModules, is_conv1d

MERGED_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in MERGED_DTYPES.items()}
_FLOATS = frozenset({*MERGED_DTYPES, "F64"})
_FOLDED_AT_ONCE = 1 << 20  # elements: half a dozen float32 copies of an output layer would be larger than all else

Folding = Sequence[tuple[AdapterFactors, float]]  # adapters and their weights


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """A base model without weights. `shared` gives, for the name of a parameter, all names of that same parameter.

    Checkpoints may leave `prefix` out of the names of tensors.
    """

    model: AdaptedModel
    prefix: str
    shared: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, model: nn.Module, modules: BaseModules, prefix: str, head: ClassifierHead | None = None
    ) -> Architecture:
        """Wraps the leaves of `model`, which may be on the meta device. `head` is a classifier's."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        shared = {name: tuple(group) for group in names.values() for name in group}
        return cls(AdaptedModel(model, modules, head), prefix, shared)

    def name_of(self, key: str) -> str:
        """What the model calls the tensor that a checkpoint calls `key`; `key` itself if it has none of the kind."""
        candidates = (key, f"{self.prefix}.{key}", key.removeprefix(f"{self.prefix}."))
        return next((name for name in candidates if name in self.shared), key)


class MergedModel:
    """A base model's files, to be written again with a selection folded in.

    `dtype` None keeps each tensor's own. Every tensor is called what the model calls it. Of a classifier, the head is
    the adapters' own where the files have none, or one for other labels; tensors that it has no use for are left out.
    """

    def __init__(self, weights: ShardedWeights, architecture: Architecture, dtype: torch.dtype | None = None) -> None:
        self._weights = weights
        self._architecture = architecture
        self._dtype = dtype
        self._keys = {architecture.name_of(key): key for key in weights.specs}
        if (head := architecture.model.head) is not None:
            self._keys = {name: key for name, key in self._keys.items() if name in architecture.shared}
            lacking = frozenset(name for name in architecture.shared if self._source(name) is None)
            architecture.model.head = replace(head, untrained=lacking)

    @property
    def head(self) -> ClassifierHead | None:
        """The head of a classifier, and what of it the files lack."""
        return self._architecture.model.head

    def factors(self, digest: str, compact: ServedCheckpoint) -> AdapterFactors:
        """An adapter as it is folded. Raises CheckpointError if it does not bind to this base."""
        check_layout(compact.layout, self._architecture.model)
        replaced = replaced_parameters(compact.extras, self._tensor)
        layers = {layer.name: LayerFactors(a, b_t) for layer, a, b_t in compact.factors()}
        return AdapterFactors(digest, layers, replaced)

    def splits_shared(self, selection: Folding) -> bool:
        """Whether the selection changes a parameter under one of its names and not under another."""
        return any(len(self._shared(f"{name}.{attribute}")) > 1 for name, attribute in changed_places(selection))

    def write(
        self,
        selection: Folding,
        directory: Path,
        *,
        shard_bytes: int,
        untied: Architecture | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> MergeReport:
        """Writes shards and their index into `directory`. `advance` is told the bytes of each tensor written.

        `untied` is the architecture that will load them, if it shares less. Raises InvalidSelection for a weight that
        is quantized, that the files do not hold, that is still shared, or that overflows.
        """
        places = {f"{name}.{attribute}": (name, attribute) for name, attribute in changed_places(selection)}
        brought = self._brought(selection)
        places = {name: place for name, place in places.items() if name not in brought}
        outputs = {name: key for name, key in self._outputs(untied).items() if name not in brought}
        self._check(places, outputs, untied or self._architecture)
        worst = FoldReport(0.0, None)

        def produce(spec: TensorSpec) -> Tensor:
            nonlocal worst
            if spec.key in brought:
                advance(spec_bytes(spec))
                return brought[spec.key]
            own = self._weights.read(outputs[spec.key])
            dtype = MERGED_DTYPES.get(spec.dtype, own.dtype)
            if spec.key in places:
                own, error = self._fold(own, places[spec.key], selection, dtype)
                if error is not None and error >= worst.merge_error:
                    worst = FoldReport(error, places[spec.key][0])
            advance(spec_bytes(spec))
            return own.to(dtype)

        specs = [self._spec(name, key) for name, key in outputs.items()]
        specs += [TensorSpec(name, _NAMES[value.dtype], tuple(value.shape)) for name, value in brought.items()]
        files = write_shards(directory, specs, produce, shard_bytes)
        return MergeReport(worst, tuple(path.name for path in files), sum(map(spec_bytes, specs)), _main_dtype(specs))

    @property
    def nbytes(self) -> int:
        """What it takes on disk, about: shared weights count once."""
        return sum(spec_bytes(self._spec(name, key)) for name, key in self._keys.items())

    def _shared(self, name: str) -> tuple[str, ...]:
        return self._architecture.shared.get(name, (name,))

    def _source(self, name: str) -> str | None:
        """The key under which the files hold a parameter, perhaps by another of its names."""
        return next((self._keys[each] for each in (name, *self._shared(name)) if each in self._keys), None)

    def _brought(self, selection: Folding) -> dict[str, Tensor]:
        """What is the adapters' alone, whole in memory: of a head that the files lack, or that has other labels.

        Raises InvalidSelection for heads that differ in their labels, and where their sum overflows.
        """
        if self.head is None:
            return {}
        brought = {}
        for name in sorted(self.head.untrained | {f"{self.head.output}.{each}" for each in self.head.parameters}):
            owner, _, attribute = name.rpartition(".")
            own, parts = self._tensor(name), replacing(selection, (owner, attribute))
            start = origin(own, [part for part, _ in parts])
            if name not in self.head.untrained and start is own:
                continue
            brought[name] = blended(start.float(), [(p.float(), weight) for p, weight in parts]).to(own.dtype)
            if not bool(brought[name].isfinite().all()):
                raise InvalidSelection(f"the selection overflows {own.dtype} in {name!r}; choose smaller weights")
        return brought

    def _tensor(self, name: str) -> Tensor:
        key = self._source(name)
        if key is None and self.head is not None and name in self.head.untrained:
            like = self._architecture.model.tensor(name)
            assert like is not None, "the head is the model's"
            return torch.zeros(like.shape, dtype=self._dtype or MERGED_DTYPES.get(_main(self._weights.specs.values())))
        if key is None:
            raise _not_held(name)
        own = self._weights.read(key)
        return own if self._dtype is None else own.to(self._dtype)

    def _outputs(self, untied: Architecture | None) -> dict[str, str]:
        """The key to read by the name to write: all that the files hold, and what is shared no longer."""
        outputs = dict(self._keys)
        for name, shared in (untied.shared if untied is not None else {}).items():
            if not any(each in outputs for each in shared) and (source := self._source(name)) is not None:
                outputs[name] = source
        return outputs

    def _spec(self, name: str, key: str) -> TensorSpec:
        own = self._weights.specs[key]
        if self._dtype is None or own.dtype not in _FLOATS:
            return TensorSpec(name, own.dtype, own.shape)
        return TensorSpec(name, _NAMES[self._dtype], own.shape)

    def _check(self, places: Mapping[str, Place], outputs: Mapping[str, str], architecture: Architecture) -> None:
        for parameter in places:
            shared = architecture.shared.get(parameter, ())
            if len(shared) > 1:
                raise InvalidSelection(
                    f"the selection changes {parameter!r}, which this architecture always shares with "
                    f"{next(name for name in shared if name != parameter)!r}: it cannot be folded in",
                    subject=parameter,
                )
            if parameter not in outputs:
                raise _not_held(parameter)
            own, expected = self._weights.specs[outputs[parameter]], architecture.model.tensor(parameter)
            assert expected is not None, "the adapter was bound"
            if own.dtype not in MERGED_DTYPES or own.shape != tuple(expected.shape):
                raise InvalidSelection(
                    f"the base holds {parameter!r} as {own.dtype} {list(own.shape)}, not as a plain weight of shape "
                    f"{list(expected.shape)}: a quantized or packed weight cannot be merged into",
                    subject=parameter,
                )

    def _fold(self, own: Tensor, place: Place, selection: Folding, dtype: torch.dtype) -> tuple[Tensor, float | None]:
        name, attribute = place
        layer = self._architecture.model.base_layer(name)
        product = None
        if attribute == "weight" and (low_rank := stacked(selection, name)) is not None:
            a, b = low_rank
            product = (a.T, b.T) if is_conv1d(layer) else (b, a)
        folded, error = fold_tensor(own, replacing(selection, place), product, dtype)
        if not math.isfinite(float(torch.linalg.vector_norm(folded, torch.inf))):
            raise InvalidSelection(
                f"the selection overflows {dtype} when folded into {name!r}; choose another --dtype or smaller weights"
            )
        return folded, error


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written: its files, their tensors' bytes, and the dtype of most of them."""

    fold: FoldReport
    files: tuple[str, ...]
    nbytes: int
    dtype: str


@torch.inference_mode()
def fold_tensor(
    own: Tensor, parts: Sequence[tuple[Tensor, float]], product: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, float | None]:
    """`W + Σ weight · (part − W) + left @ right` in float32, rounded once to `dtype`.

    own [rows, columns] or [features]; left [rows, R], right [R, columns], both float32. Returns it with what rounding
    lost of the product, ‖fold(W) − W − Δ‖ / ‖Δ‖; None without a product. Works on a few rows at a time.
    """
    folded = torch.empty(own.shape, dtype=dtype)
    lost = change = 0.0
    for rows in _blocks(own):
        wide = blended(own[rows].float(), [(part[rows].float(), weight) for part, weight in parts])
        if product is None:
            folded[rows] = wide
            continue
        left, right = product
        delta = left[rows] @ right
        folded[rows] = wide + delta
        lost += float((folded[rows].float() - wide - delta).norm()) ** 2
        change += float(delta.norm()) ** 2
    if product is None:
        return folded, None
    return folded, math.sqrt(lost / change) if change else 0.0


def _blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first axis, each of about as many elements as are folded at once."""
    rows = len(tensor)
    step = max(1, _FOLDED_AT_ONCE // max(1, tensor.numel() // max(1, rows)))
    return (slice(start, start + step) for start in range(0, rows, step))


def _main_dtype(specs: Iterable[TensorSpec]) -> str:
    name = _main(specs)
    return str(MERGED_DTYPES.get(name, name)).removeprefix("torch.")


def _main(specs: Iterable[TensorSpec]) -> str:
    """What most of the tensors are in, as safetensors calls it."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec_bytes(spec)
    (name, _), *_ = sizes.most_common()
    return name


def _not_held(parameter: str) -> InvalidSelection:
    return InvalidSelection(
        f"the selection changes {parameter!r}, which the base's files do not hold under that name: weights that are "
        "quantized, or stored in another layout than the model's, cannot be merged into",
        subject=parameter,
    )
