"""What the tests of `adapters` share: small ways from a model and a checkpoint to token logits, and raw files."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.checkpoint import TopKCheckpoint, read_checkpoint
from adapters.factors import AdapterFactors, LayerFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from adapters.packed import pack_linear_layers
from adapters.reading import as_served, read_adapter
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.targets import BaseModules

PROMPT = list(b"The quick brown fox")
BANK = "base_model.vblora_vector_bank"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"  # of llama and qwen2

_DTYPE_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}


def base_modules(model: PreTrainedModel) -> BaseModules:
    return BaseModules.of(
        model, model_type=model.config.model_type, output_layer=model.get_output_embeddings(), names=["org/base"]
    )


def adapted(model: PreTrainedModel, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> AdaptedModel:
    """A wrapped copy; the model stays as it is."""
    model = copy.deepcopy(model).to(dtype)
    modules = base_modules(model)
    if packed:
        assert pack_linear_layers(model) > 0
    return AdaptedModel(model, modules)


def compact(path: Path) -> TopKCheckpoint:
    checkpoint = read_checkpoint(path)
    return checkpoint if isinstance(checkpoint, TopKCheckpoint) else checkpoint.to_topk()


def factors(path: Path) -> AdapterFactors:
    checkpoint = as_served(read_adapter(path))
    layers = {layer.name: LayerFactors(a.contiguous(), b_t) for layer, a, b_t in checkpoint.factors()}
    selections = checkpoint if isinstance(checkpoint, TopKCheckpoint) else None
    return AdapterFactors(path.name, layers, selections=selections)


@torch.inference_mode()
def token_logits(model: AdaptedModel, prompts: Sequence[Sequence[int]], batch: LowRankBatch | None = None) -> Tensor:
    """Float32 token logits [rows, tokens, vocab] of prompts of one length."""
    with model.using(batch):
        return model.model(input_ids=torch.tensor(prompts), use_cache=False).logits.float()


def alone(*adapters: AdapterFactors, weights: Sequence[float] = ()) -> LowRankBatch:
    """Every row with the same adapters."""
    return LowRankBatch(adapters, torch.tensor([list(weights) or [1.0] * len(adapters)]))


def write_raw(header: Mapping[str, Any] | bytes, data: bytes, path: Path) -> Path:
    """A safetensors file with any header; the directory that it lies in."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.mkdir(parents=True, exist_ok=True)
    (path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """Header and data of tensors one after the other in the given order, without any alignment."""
    header, data = {}, b""
    for key, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return header, data
