"""Random families of adapters of one tiny base model, for hypothesis: drawn as a few numbers, written as raw files.

Nothing here comes from `adapters`: files are written key by key, as PEFT writes them. What hypothesis shows of a
failure is a `RawVBLoRA` or `RawLoRA`, which makes the same file again. What files mean is in `tests.dense`.

    @given(families())
    def test_…(family: Family) -> None:
        with written(family) as members: …
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.factories import CONFIG_FILE, WEIGHTS_FILE, Arch, generator_of, tiny_model

ARCHS: list[Arch] = ["llama", "qwen2", "gpt2"]
HIDDEN = 24
SIZES: dict[str, dict[str, int]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 1},
    "gpt2": {"n_inner": 48},
}
_OF_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head")
TARGETS = {"llama": _OF_LLAMA, "qwen2": _OF_LLAMA, "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head")}
SAVED = {
    "llama": ("lm_head", "embed_tokens", "input_layernorm", "gate_proj"),
    "qwen2": ("lm_head", "embed_tokens", "input_layernorm", "gate_proj"),
    "gpt2": ("lm_head", "wte", "wpe", "ln_1", "ln_f"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PREFIX = "base_model.model."


@cache
def base(arch: Arch) -> PreTrainedModel:
    """Features are multiples of 12, most of 24: many lengths of vectors fit, the hidden size itself too."""
    return tiny_model(arch, hidden_size=HIDDEN, num_attention_heads=2, vocab_size=264, **SIZES[arch])


@cache
def shapes(arch: Arch) -> Mapping[str, tuple[int, int]]:
    """(in_features, out_features) of every layer that can be adapted."""
    return {
        name: (module.weight.shape if is_conv1d(module) else module.weight.shape[::-1])
        for name, module in base(arch).named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def of_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


# --- what is drawn --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """What files of both types have.

    `numbers` are layers_to_transform, `strength` is the factors' size; `whole` says that a targeted lm_head's own
    weight is there too, which PEFT stores unasked.
    """

    arch: Arch
    seed: int
    targets: tuple[str, ...]
    numbers: tuple[int, ...] | None
    spelled: Literal["suffixes", "names", "regex"]
    r: int
    dtype: torch.dtype
    strength: float
    bias: Literal["none", "all", "targets"] = "none"
    saved: tuple[str, ...] = ()
    whole: bool = False

    @property
    def layers(self) -> Mapping[str, tuple[int, int]]:
        endings = tuple(f".{target}" for target in self.targets)
        places = tuple(f".{number}." for number in self.numbers or (0, 1))
        return {
            name: shape
            for name, shape in shapes(self.arch).items()
            if name in self.targets or (name.endswith(endings) and any(place in name for place in places))
        }

    def shared_fields(self, peft_type: str) -> dict[str, Any]:
        names = list(self.layers)
        targets: dict[str, list[str] | str] = {
            "suffixes": list(self.targets),
            "names": names,
            "regex": "|".join(map(re.escape, names)),
        }
        return {
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
            "r": self.r,
            "target_modules": targets[self.spelled],
            "layers_to_transform": list(self.numbers) if self.numbers and self.spelled == "suffixes" else None,
            "bias": self.bias if self.bias != "targets" else {"VBLORA": "vblora_only", "LORA": "lora_only"}[peft_type],
            "modules_to_save": list(self.saved) or None,
            "fan_in_fan_out": self.arch == "gpt2",
        }

    def noise(self, key: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator_of(self.seed, key))

    def extras(self) -> dict[str, Tensor]:
        """Trained biases and saved modules, under the keys that PEFT gives them."""
        layers = self.layers
        tensors = {}
        for name, own in base(self.arch).named_parameters(remove_duplicate=False):
            owner, _, attribute = name.rpartition(".")
            is_saved = owner.endswith(self.saved) if self.saved else False
            trained = self.bias == "all" or (self.bias == "targets" and owner in layers)
            if not is_saved and not (attribute == "bias" and trained):
                continue
            value = (own.detach() + 0.2 * self.noise(name, *own.shape)).to(self.dtype)
            inner = "base_layer." if owner in layers else ""
            tensors[f"{PREFIX}{owner}.{inner}{attribute}"] = value
            if is_saved and attribute == "bias" and self.bias == "all":  # PEFT's wrapper of a saved module, looked into
                tensors[f"{PREFIX}{owner}.modules_to_save.bias"] = value.clone()
                tensors[f"{PREFIX}{owner}.original_module.bias"] = own.detach().clone()
        if self.whole and "lm_head" in layers:
            tensors[f"{PREFIX}lm_head.base_layer.weight"] = base(self.arch).lm_head.weight.detach().clone()
        return tensors

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        (path / CONFIG_FILE).write_text(json.dumps(self.config()))
        save_file(self.tensors(), path / WEIGHTS_FILE, metadata={"format": "pt"})
        return path


@dataclass(frozen=True)
class RawVBLoRA(Raw):
    """`spread` is the logits' standard deviation: at 30 most weights are 0 or 1."""

    num_vectors: int = 2
    vector_length: int = 1
    topk: int = 1
    compact: bool = True
    spread: float = 1.0

    def config(self) -> dict[str, Any]:
        return {
            **self.shared_fields("VBLORA"),
            "num_vectors": self.num_vectors,
            "vector_length": self.vector_length,
            "topk": self.topk,
            "save_only_topk_weights": self.compact,
        }

    def tensors(self) -> dict[str, Tensor]:
        bank = self.strength * self.noise("bank", self.num_vectors, self.vector_length)
        tensors = {"base_model.vblora_vector_bank": bank.to(self.dtype), **self.extras()}
        for name, (in_features, out_features) in self.layers.items():
            tiles = in_features // self.vector_length, out_features // self.vector_length
            for side, rows in (("A", (self.r, tiles[0])), ("B", (tiles[1], self.r))):
                key = f"{PREFIX}{name}.vblora_logits_{side}"
                logits = (self.spread * self.noise(key, *rows, self.num_vectors)).to(self.dtype)
                if not self.compact:
                    tensors[key] = logits
                    continue
                best, indices = logits.topk(self.topk, dim=-1)
                order = self.noise(f"{key} order", *rows, self.topk).argsort(-1)  # the heaviest may be anywhere
                weights = best.float().softmax(-1).gather(-1, order)[..., :-1]
                dtype = torch.uint8 if self.num_vectors < 256 else torch.int16
                tensors[f"{key}_topk_indices"] = indices.gather(-1, order).to(dtype)
                tensors[f"{key}_topk_weights"] = weights.to(self.dtype).contiguous()
        return tensors


def raw_vblora(**fields: Any) -> RawVBLoRA:
    """One for an example; a small one of llama's q_proj unless `fields` say otherwise."""
    given: dict[str, Any] = {
        "arch": "llama", "seed": 0, "targets": ("q_proj",), "numbers": None, "spelled": "suffixes", "r": 2,
        "dtype": torch.float32, "strength": 1.0, "num_vectors": 5, "vector_length": 4, "topk": 2,
    }  # fmt: skip
    return RawVBLoRA(**{**given, **fields})


@dataclass(frozen=True)
class RawLoRA(Raw):
    alpha: float = 8
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def config(self) -> dict[str, Any]:
        return {
            **self.shared_fields("LORA"),
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
        }

    def tensors(self) -> dict[str, Tensor]:
        tensors = self.extras()
        for name, (in_features, out_features) in self.layers.items():
            rank = of_pattern(dict(self.ranks), name, self.r)
            a, b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
            tensors[a] = (self.strength * self.noise(a, rank, in_features)).to(self.dtype)
            tensors[b] = (self.strength * self.noise(b, out_features, rank)).to(self.dtype)
        return tensors


Weighted = tuple[Raw, float]
Family = list[Weighted]


@st.composite
def _shared(draw: st.DrawFn, arch: Arch, extras: bool, strengths: Sequence[float]) -> dict[str, Any]:
    targets = draw(st.lists(st.sampled_from(TARGETS[arch]), min_size=1, max_size=3, unique=True))
    numbers = draw(st.sampled_from([None, None, (0,), (1,), (0, 1)]))
    if targets == ["lm_head"]:
        numbers = None
    saved: list[str] = []
    if extras:
        saved = draw(st.lists(st.sampled_from(SAVED[arch]), max_size=2, unique=True))
    return {
        "arch": arch,
        "seed": draw(st.integers(0, 999)),
        "targets": tuple(targets),
        "numbers": numbers,
        "spelled": draw(st.sampled_from(["suffixes", "names", "regex"])),
        "r": draw(st.sampled_from([1, 2, 3, 5, HIDDEN + 3])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "strength": draw(st.sampled_from(list(strengths))),
        "bias": draw(st.sampled_from(["none", "all", "targets"])) if extras else "none",
        "saved": tuple(name for name in saved if name not in targets),
        "whole": extras,
    }


STRENGTHS = (0.02, 1.0, 50.0)


@st.composite
def vbloras(draw: st.DrawFn, arch: Arch, *, extras: bool = False, strengths: Sequence[float] = STRENGTHS) -> RawVBLoRA:
    shared = draw(_shared(arch, extras, strengths))
    features = math.gcd(*(size for shape in Raw(**shared).layers.values() for size in shape))
    num_vectors = draw(st.sampled_from([1, 2, 5, 9, 40, 256]))
    return RawVBLoRA(
        **shared,
        num_vectors=num_vectors,
        vector_length=draw(st.sampled_from([n for n in (1, 2, 3, 4, 8, 12, HIDDEN) if features % n == 0])),
        topk=min(num_vectors, draw(st.sampled_from([1, 2, 3, 5]))),
        compact=draw(st.booleans()),
        spread=draw(st.sampled_from([1.0, 1.0, 6.0, 30.0])),
    )


@st.composite
def loras(draw: st.DrawFn, arch: Arch, *, extras: bool = False, strengths: Sequence[float] = STRENGTHS) -> RawLoRA:
    shared = draw(_shared(arch, extras, strengths))
    names = list(Raw(**shared).layers)
    keys = st.sampled_from([*shared["targets"], *names, r".*\.1\..*", names[-1].replace(".", r"\."), "nothing"])
    return RawLoRA(
        **shared,
        alpha=draw(st.sampled_from([0, 1, 3, 8, 16.5])),
        rslora=draw(st.booleans()),
        ranks=tuple(draw(st.dictionaries(keys, st.sampled_from([1, 2, 7]), max_size=2)).items()),
        alphas=tuple(draw(st.dictionaries(keys, st.sampled_from([0, 2, 30, 0.5]), max_size=2)).items()),
    )


WEIGHTS = st.floats(-3, 3, width=32) | st.sampled_from([1.0, -1.0, 0.0, 1e-3, -1e4])
MILD_WEIGHTS = st.floats(-1.5, 1.5, width=16) | st.sampled_from([1.0, -1.0, 0.0])


@st.composite
def families(
    draw: st.DrawFn,
    *,
    most: int = 4,
    with_lora: bool = False,
    weights: st.SearchStrategy[float] = WEIGHTS,
    **options: Any,
) -> Family:
    """Members of one base with their weights; sometimes the same one twice. With LoRA among them, if asked for."""
    arch = draw(st.sampled_from(ARCHS))
    kinds: st.SearchStrategy[Raw] = vbloras(arch, **options)
    members = draw(st.lists(loras(arch, **options) | kinds if with_lora else kinds, min_size=1, max_size=most))
    if with_lora and not any(isinstance(member, RawLoRA) for member in members):
        members[-1] = draw(loras(arch, **options))
    if len(members) < most and draw(st.booleans()):
        members.append(draw(st.sampled_from(members)))
    return [(member, draw(weights)) for member in members]


@contextmanager
def written(family: Sequence[Weighted]) -> Iterator[list[tuple[Path, float]]]:
    """The members' directories with their weights, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        yield [(raw.write(Path(folder) / f"{i}"), weight) for i, (raw, weight) in enumerate(family)]
