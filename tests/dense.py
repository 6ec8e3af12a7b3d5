"""What adapter files mean: deltas and parameters in float64 from the files alone, and those that PEFT computes.

Nothing here comes from `adapters`.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor

from tests.factories import CONFIG_FILE, WEIGHTS_FILE, Arch, untouched_rng
from tests.families import PREFIX, base, is_conv1d, of_pattern

Deltas = dict[str, Tensor]


def dense_deltas(path: Path) -> Deltas:
    """Each adapted layer's delta [out, in] in float64, from the file itself."""
    config, tensors = json.loads((path / CONFIG_FILE).read_text()), load_file(path / WEIGHTS_FILE)
    of = _dense_vblora if config["peft_type"] == "VBLORA" else _dense_lora
    names = {match[1]: None for key in tensors if (match := re.match(rf"{PREFIX}(.+)\.(vblora|lora)_", key))}
    return {name: of(config, tensors, name) for name in names}


def _dense_vblora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    bank = tensors["base_model.vblora_vector_bank"].double()
    sides = []
    for side in "AB":
        key = f"{PREFIX}{name}.vblora_logits_{side}"
        if key in tensors:
            best, indices = tensors[key].float().topk(config["topk"], dim=-1)
            weights = best.double().softmax(-1)
        else:
            indices, stored = tensors[f"{key}_topk_indices"].long(), tensors[f"{key}_topk_weights"].double()
            stored = stored / stored.sum(-1, keepdim=True).clamp_min(1)
            weights = torch.cat([stored, 1 - stored.sum(-1, keepdim=True)], -1)
        sides.append((weights.unsqueeze(-1) * bank[indices]).sum(-2))
    a, b = sides  # [r, in_tiles, length], [out_tiles, r, length]
    return torch.einsum("orl,ri->oli", b, a.flatten(1)).flatten(0, 1)


def _dense_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
    rank = of_pattern(config["rank_pattern"], name, config["r"])
    alpha = of_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    assert len(a) == rank
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a


def weighted_sum_of(members: Sequence[tuple[Deltas, float]]) -> tuple[Deltas, dict[str, float]]:
    """`Σ w · delta`, and what its error is measured by: `Σ |w| · max |delta|`, by layer."""
    total: Deltas = {}
    scale: dict[str, float] = {}
    for deltas, weight in members:
        for name, delta in deltas.items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
            scale[name] = scale.get(name, 0.0) + abs(weight) * float(delta.abs().max())
    return total, scale


def assert_deltas(got: Mapping[str, Tensor], expected: Deltas, scale: Mapping[str, float], bound: float = 2e-6) -> None:
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        error = float((got[name].double() - delta).abs().max())
        assert error <= bound * scale[name] + 1e-30, f"{name}: {error:.3g} of {scale[name]:.3g}"


def own_parameters(arch: Arch, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The base's own in float64, as it has them in a dtype; those that are tied under each name."""
    named = base(arch).named_parameters(remove_duplicate=False)
    return {name: parameter.detach().to(dtype).double() for name, parameter in named}


def dense_extras(
    arch: Arch, members: Sequence[tuple[Path, float]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`W0 + Σ w · (W − W0)` in float64 of what the members save whole, as a base in `dtype` has and takes it."""
    own = own_parameters(arch, dtype)
    extras: dict[str, Tensor] = {}
    for path, weight in members:
        for key, tensor in load_file(path / WEIGHTS_FILE).items():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name in own:
                extras[name] = extras.get(name, own[name]) + weight * (tensor.to(dtype).double() - own[name])
    return extras


def dense_parameters(
    arch: Arch, members: Sequence[tuple[Path, float]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every parameter that the members change, float64: what they save, and `Σ w · delta` as the layer keeps it."""
    own, changed = own_parameters(arch, dtype), dense_extras(arch, members, dtype)
    for path, weight in members:
        for name, delta in dense_deltas(path).items():
            oriented = delta.T if is_conv1d(base(arch).get_submodule(name)) else delta
            changed[f"{name}.weight"] = changed.get(f"{name}.weight", own[f"{name}.weight"]) + weight * oriented
    return changed


# --- what PEFT makes of it ------------------------------------------------------------------------


def peft_model(arch: Arch, path: Path) -> PeftModel:
    """A copy of the base with the adapter loaded by PEFT, to which every tensor of the file belongs."""
    with warnings.catch_warnings(), untouched_rng():
        warnings.simplefilter("ignore", UserWarning)
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = True
        model = PeftModel(copy.deepcopy(base(arch)), config)
        result = model.load_adapter(str(path), "default")
    # With `bias: all` PEFT writes a saved module's bias a second time, and does not know the copy again.
    assert not [key for key in result.unexpected_keys if not key.endswith(".modules_to_save.bias")]
    # PEFT shows the bank in every layer that refers to it, and files have it once.
    assert not [key for key in result.missing_keys if re.search(r"lora_(?!vector_bank)", key)]
    return model.eval()


def peft_deltas(arch: Arch, path: Path) -> Deltas:
    """PEFT's own deltas [out, in]."""
    deltas = {}
    for name, module in peft_model(arch, path).base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            delta = module.get_delta_weight("default").detach()
            deltas[name] = delta.T if is_conv1d(module.get_base_layer()) else delta
    return deltas
