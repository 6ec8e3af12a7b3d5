"""Quantized base models: how they are asked for, what transformers is told, and what is then known of them.

`int8` is torchao's, of weights alone, on every device; `nf4` is bitsandbytes'. bitsandbytes' own 8 bits (LLM.int8())
are not offered: they look for outliers over all rows of a batch, so that a row's answer depends on its neighbours. A
checkpoint that is quantized already is loaded as it is, and one of that kind is run one row at a time.

Refusals are ImportErrors and ValueErrors, which loading turns into a BaseModelError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from adapters.quantized import holds_quantized
from adapters.targets import adaptable_shape

log = logging.getLogger(__name__)

NONE = "none"
_FUSED_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Scheme:
    """One value of the setting: the package that does it, and transformers' config of it.

    That is made for a dtype of activations and the modules to leave as they are, None for transformers' own choice.
    """

    package: str
    config: Callable[[torch.dtype, list[str] | None], Any]


def _int8(dtype: torch.dtype, kept: list[str] | None) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # optional, and slow to import
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)


def _nf4(dtype: torch.dtype, kept: list[str] | None) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


_SCHEMES = {"int8": _Scheme("torchao", _int8), "nf4": _Scheme("bitsandbytes", _nf4)}
CHOICES = (NONE, *_SCHEMES)
_EXTRA = frozenset(scheme.package for scheme in _SCHEMES.values())


def loading_arguments(
    config: Any,
    quantization: str,
    dtype: torch.dtype | str,
    device: torch.device,
    kept: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What `from_pretrained` is given besides, for a model of this config; nothing for one that is not quantized.

    `kept` names the modules that are to stay as they are; by default transformers chooses, which knows language
    models: it keeps their output layer. A checkpoint that is quantized already has its own.

    Raises ImportError for a package that is missing, and ValueError for a checkpoint that is quantized otherwise.
    """
    made_so = method_of(config)
    if made_so is None and quantization == NONE:
        return {}
    place = {"device_map": {"": device}}  # quantized where it will run; transformers would choose for itself
    if made_so is not None:
        if quantization != NONE:
            raise ValueError(
                f"the checkpoint is quantized already ({made_so}): leave out --quantization {quantization}, or give "
                "the checkpoint it was made from"
            )
        _check_installed({made_so.partition("-")[0]} & _EXTRA, made_so)
        return place
    if quantization not in _SCHEMES:
        raise ValueError(f"quantization is {quantization!r}; it must be one of {', '.join(CHOICES)}")
    scheme = _SCHEMES[quantization]
    _check_installed({scheme.package}, f"--quantization {quantization}")
    activations = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.bfloat16)
    return {**place, "quantization_config": scheme.config(activations, None if kept is None else list(kept))}


def _check_installed(packages: set[str], what: str) -> None:
    if absent := sorted(package for package in {*packages, "accelerate"} if find_spec(package) is None):
        raise ImportError(f"{what} needs {' and '.join(absent)}: pip install 'vblora-serve[quantization]'")


def method_of(config: Any) -> str | None:
    """How a checkpoint says that it is quantized: `gptq`, `bitsandbytes-4bit`, …; None if it is not."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    method = getattr(given.get("quant_method"), "value", given.get("quant_method"))
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return f"bitsandbytes-{'4' if given.get('load_in_4bit') else '8'}bit"
    return str(method) if method else "an unnamed method"


def quantization_of(model: nn.Module, config: Any, asked: str) -> str | None:
    """How a loaded model is quantized: the setting's name, else the checkpoint's; None where no layer of it is.

    Raises ValueError if it was asked for and nothing came of it. Says so where a checkpoint lost its quantization, as
    some methods do on a device that cannot compute with them, and where most of the model is not quantized.
    """
    name = method_of(config) if asked == NONE else asked
    linear = [module for module in model.modules() if adaptable_shape(module) is not None]
    quantized = sum(holds_quantized(module) for module in linear)
    if name is None:
        return None
    if not quantized and asked != NONE:
        raise ValueError(
            f"{asked} quantizes no layer of {type(model).__name__}; choose another --quantization "
            f"({', '.join(each for each in CHOICES if each != asked)})"
        )
    if not quantized:
        log.warning("transformers has dequantized the checkpoint (%s): it runs, and takes memory, in full", name)
        return None
    log.info("the base model is quantized", extra={"method": name, "layers": quantized, "of_layers": len(linear)})
    return name


def prepare(model: nn.Module) -> None:
    """Keeps bitsandbytes' fused kernel for CPUs with AVX512-BF16 from layers that it fails on: it takes whole tiles."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and not _fits_fused_kernel(module):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - to mypy, parameters and modules alone


def _fits_fused_kernel(module: Any) -> bool:
    state = getattr(module.weight, "quant_state", None)
    return state is None or (module.out_features % _FUSED_ROWS == 0 and module.in_features % state.blocksize == 0)


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model's activations are in: the dtype of its first parameter that is no packed integers."""
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)


def rounds_to(model: nn.Module) -> torch.dtype:
    """What a model computes in at its coarsest: bfloat16, whatever its dtype is, where that kernel runs."""
    fused = any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    on_cpu = all(parameter.device.type in ("cpu", "meta") for parameter in model.parameters())  # meta: packed
    return torch.bfloat16 if fused and on_cpu else dtype_of(model)


def mixes_rows(model: nn.Module) -> bool:
    """Whether a row's answer depends on its neighbours: LLM.int8() looks for outliers over all rows of a batch."""
    return any(getattr(getattr(module, "state", None), "threshold", 0) > 0 for module in model.modules())


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a model's weights are stored in, by name in a fixed order: scales and packed integers, each plain."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            yield from _plain(name, value)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(tensor, part), Tensor):
            yield from _plain(f"{name}.{part}", inner)


def weight_bytes(model: nn.Module) -> int:
    """What the weights take in memory, each tensor once however many names it has."""
    return sum({tensor.data_ptr(): tensor.nbytes for _, tensor in stored_tensors(model) if tensor.nbytes}.values())
