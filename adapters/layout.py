"""What a checkpoint file declares, checked against its config before a tensor is read.

Keys (PEFT 0.13 to 0.21): `base_model.vblora_vector_bank`; `base_model.model.<module>.vblora_logits_A` and `…_B` (full
logits), or the same with `_topk_indices` and `_topk_weights` (compact); and, outside VB-LoRA, trained biases and saved
modules, here called *extras*.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from adapters.config import AdapterConfig, VBLoRAConfig, read_config
from adapters.errors import BadConfig, BadIndex, MissingTensor, ShapeMismatch, UnexpectedTensor
from adapters.parameters import ParameterCount, Storage, count_parameters
from adapters.safetensors_header import WEIGHTS_FILE, RawHeader, TensorSpec, parse_header, read_header
from adapters.split_file import BANK_KEY as BANK_KEY
from adapters.targets import LayerShape, check_targets

MODULE_PREFIX = "base_model.model."
# PEFT stores these unasked when they are targets or the vocabulary was resized (its EMBEDDING_LAYER_NAMES, and the
# names that other architectures give the same layers).
EMBEDDING_NAMES = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"})

_VBLORA_KEY = re.compile(r"base_model\.model\.(.+)\.vblora_logits_([AB])(|_topk_indices|_topk_weights)")
_WRAPPED = re.compile(r"\.(?:modules_to_save|original_module)(?=\.)")
_FLOATS = frozenset({"F32", "BF16", "F16"})
_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FULL = frozenset({""})
_COMPACT = frozenset({"_topk_indices", "_topk_weights"})

# module → side ("A" or "B") → part ("" for full logits) → the tensor
_Parts = dict[str, dict[str, dict[str, TensorSpec]]]


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """One checkpoint's config, its layers in file order, and the tensors it holds besides VB-LoRA's."""

    config: VBLoRAConfig
    storage: Storage
    layers: tuple[LayerShape, ...]
    extras: tuple[TensorSpec, ...] = ()

    def parameters(self) -> ParameterCount:
        # PEFT counts what training changed: not the embeddings that it stores unasked.
        other = sum(spec.elements for spec in self.extras if called_for(self.config, spec, self.layer_names))
        return count_parameters(self.config, self.layers, storage=self.storage, other_params=other)

    @property
    def layer_names(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers)

    def spans(self) -> Iterator[tuple[LayerShape, slice, slice]]:
        """Each layer with the rows that its A and its B take in tensors packed by position.

        A's positions come first, [r, in_tiles] flattened, then B's, [out_tiles, r] flattened.
        """
        start = 0
        for layer in self.layers:
            middle = start + self.config.r * (layer.in_features // self.config.vector_length)
            end = middle + self.config.r * (layer.out_features // self.config.vector_length)
            yield layer, slice(start, middle), slice(middle, end)
            start = end


def logits_key(module: str, side: str) -> str:
    return f"{MODULE_PREFIX}{module}.vblora_logits_{side}"


def read_layout(directory: Path) -> AdapterLayout:
    """The layout of a VB-LoRA adapter directory, from its config and the header of its weights: no tensor is read.

    Adapters whose config and header are the same to the byte share one layout: those of a family, say, that differ in
    their tensors alone. Raises a CheckpointError that names the file, the field or the tensor at fault.
    """
    return _parsed(read_config(directory), read_header(directory / WEIGHTS_FILE))


@lru_cache(maxsize=32)
def _parsed(config: bytes, header: RawHeader) -> AdapterLayout:
    return layout_of(VBLoRAConfig.parse(config), parse_header(header))


def layout_of(config: VBLoRAConfig, specs: Mapping[str, TensorSpec]) -> AdapterLayout:
    """The layout that a config and a file's tensors make together. Raises CheckpointError."""
    _check_bank(config, specs.get(BANK_KEY))
    parts, extras = _sort_keys(specs)
    storage = _storage(config, parts)
    layers = tuple(_layer(config, storage, module, sides) for module, sides in parts.items())
    check_targets(config, [layer.name for layer in layers])
    extras = without_copies(config, extras)
    for extra in extras:
        check_extra(config, extra, parts.keys())
    check_distinct(extras)
    return AdapterLayout(config, storage, layers, tuple(extras))


def _check_bank(config: VBLoRAConfig, bank: TensorSpec | None) -> None:
    if bank is None:
        raise MissingTensor(f"the file has no vector bank ({BANK_KEY})", subject=BANK_KEY)
    expect_shape(bank, (config.num_vectors, config.vector_length), "[num_vectors, vector_length]")
    expect_float(bank)


def _sort_keys(specs: Mapping[str, TensorSpec]) -> tuple[_Parts, list[TensorSpec]]:
    parts: _Parts = {}
    extras: list[TensorSpec] = []
    for key, spec in specs.items():
        if match := _VBLORA_KEY.fullmatch(key):
            module, side, part = match.groups()
            parts.setdefault(module, {}).setdefault(side, {})[part] = spec
        elif key != BANK_KEY:
            extras.append(spec)
    if not parts:
        raise MissingTensor("the file holds a vector bank but no VB-LoRA logits for any module", subject=WEIGHTS_FILE)
    return parts, extras


def _storage(config: VBLoRAConfig, parts: _Parts) -> Storage:
    kinds = {part for sides in parts.values() for tensors in sides.values() for part in tensors}
    if "" in kinds and len(kinds) > 1:
        raise UnexpectedTensor("the file mixes full logits with top-k tensors; save it again", subject=WEIGHTS_FILE)
    storage = Storage.LOGITS if "" in kinds else Storage.TOPK
    if config.save_only_topk_weights != (storage is Storage.TOPK):
        held = "top-k indices and weights" if storage is Storage.TOPK else "full logits"
        raise BadConfig(
            f"save_only_topk_weights is {str(config.save_only_topk_weights).lower()} but the file holds {held}; "
            "make the config agree with the file",
            subject="save_only_topk_weights",
        )
    return storage


def _layer(config: VBLoRAConfig, storage: Storage, module: str, sides: dict[str, dict[str, TensorSpec]]) -> LayerShape:
    wanted = _COMPACT if storage is Storage.TOPK else _FULL
    for side in ("A", "B"):
        for part in sorted(wanted - sides.get(side, {}).keys()):
            key = logits_key(module, side) + part
            raise MissingTensor(f"the file has no {key}", subject=key)
    in_tiles = _tiles(config, storage, sides["A"], axis=1)
    out_tiles = _tiles(config, storage, sides["B"], axis=0)
    return LayerShape(module, in_tiles * config.vector_length, out_tiles * config.vector_length)


def _tiles(config: VBLoRAConfig, storage: Storage, tensors: dict[str, TensorSpec], *, axis: int) -> int:
    """How many tiles a factor has, once its tensors agree with each other and with the config."""
    first = min(tensors.values(), key=lambda spec: spec.key)
    if len(first.shape) != 3 or not first.shape[axis]:
        raise ShapeMismatch(
            f"{first.key} has shape {list(first.shape)}; a 3-dimensional tensor with at least one tile was expected",
            subject=first.key,
        )
    tiles = first.shape[axis]
    rows = (config.r, tiles) if axis == 1 else (tiles, config.r)
    named = "[r, in_tiles" if axis == 1 else "[out_tiles, r"
    for part, spec in tensors.items():
        depth, depth_name = _depth(config, part)
        if part == "_topk_indices":
            _expect_integer(spec)
        else:
            expect_float(spec)
        expect_shape(spec, (*rows, depth), f"{named}, {depth_name}]")
    return tiles


def _depth(config: VBLoRAConfig, part: str) -> tuple[int, str]:
    if part == "_topk_indices":
        return config.topk, "topk"
    if part == "_topk_weights":
        return config.topk - 1, "topk - 1"
    return config.num_vectors, "num_vectors"


def called_for(config: AdapterConfig, spec: TensorSpec, targets: Collection[str]) -> bool:
    """Whether the config's `bias` or `modules_to_save` says that this tensor, not of a factor, was trained."""
    name = spec.key.removeprefix(MODULE_PREFIX)
    # PEFT saves a module whose name ends in one of modules_to_save, also in the middle of a word, and all it contains.
    holders = [name[:dot] for dot, character in enumerate(name) if character == "."]
    if any(holder.endswith(config.modules_to_save) for holder in holders):
        return True
    if name != "bias" and not name.endswith(".bias"):
        return False
    return config.bias == "all" or (config.bias == config.BIAS_OF_TARGETS and extra_owner(spec.key) in targets)


def extra_owner(key: str) -> str:
    """The base model's module that an extra belongs to. PEFT writes a target's own tensors under `base_layer`."""
    return key.removeprefix(MODULE_PREFIX).rpartition(".")[0].removesuffix(".base_layer")


def check_extra(config: AdapterConfig, spec: TensorSpec, targets: Collection[str]) -> None:
    """A tensor besides the factors' is one that PEFT would have saved. Raises UnexpectedTensor or ShapeMismatch."""
    expect_float(spec)
    if not spec.key.startswith(MODULE_PREFIX):
        raise UnexpectedTensor(f"nothing in a {config.PEFT_TYPE} checkpoint is called {spec.key!r}", subject=spec.key)
    embedding = extra_owner(spec.key).rsplit(".", 1)[-1] in EMBEDDING_NAMES
    own = spec.key.endswith((".weight", ".bias"))  # Phi's and GPT-J's lm_head have a bias
    if not (embedding and own) and not called_for(config, spec, targets):
        raise UnexpectedTensor(
            f"the file holds {spec.key!r}, which neither bias ({config.bias!r}) nor modules_to_save "
            f"({list(config.modules_to_save)}) calls for",
            subject=spec.key,
        )


def without_copies(config: AdapterConfig, extras: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Without the biases that PEFT stores twice: with `bias: all` it looks into its wrappers of saved modules too.

    There it finds the saved module's bias by another name (`….modules_to_save.bias`), and the base's own
    (`….original_module.bias`). What it computes with is the one without either, as a saved module's weight is.
    """
    shapes = {spec.key: spec.shape for spec in extras}
    return [spec for spec in extras if config.bias != "all" or not _is_copy(spec, shapes)]


def _is_copy(spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    plain = _WRAPPED.sub("", spec.key)
    return plain != spec.key and spec.key.endswith(".bias") and shapes.get(plain) == spec.shape


def check_distinct(extras: Iterable[TensorSpec]) -> None:
    """PEFT's two names of one parameter, with and without `base_layer`, must not both be there, or UnexpectedTensor."""
    seen: dict[str, str] = {}
    for spec in extras:
        parameter = f"{extra_owner(spec.key)}.{spec.key.rpartition('.')[2]}"
        if (other := seen.setdefault(parameter, spec.key)) != spec.key:
            raise UnexpectedTensor(
                f"the file holds {other!r} and {spec.key!r}, two values for one parameter", subject=spec.key
            )


def expect_shape(spec: TensorSpec, shape: tuple[int, ...], named: str) -> None:
    """Raises ShapeMismatch that spells out what the shape should have been."""
    if spec.shape != shape:
        raise ShapeMismatch(
            f"{spec.key} has shape {list(spec.shape)}; the config calls for {named} = {list(shape)}", subject=spec.key
        )


def expect_float(spec: TensorSpec) -> None:
    """Raises ShapeMismatch for a dtype that factors cannot have."""
    if spec.dtype not in _FLOATS:
        raise ShapeMismatch(
            f"{spec.key} has dtype {spec.dtype}; float32, bfloat16 or float16 was expected", subject=spec.key
        )


def _expect_integer(spec: TensorSpec) -> None:
    if spec.dtype not in _INTEGERS:
        raise BadIndex(f"{spec.key} has dtype {spec.dtype}; indices must be integers", subject=spec.key)
