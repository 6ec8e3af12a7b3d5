"""Plain LoRA adapters written by PEFT itself, with values as strong as those of `tests.factories`."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.factories import AdapterSpec, generator_of, save_adapter, untouched_rng


def trainable_lora(
    model: PreTrainedModel, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> PeftModel:
    """A copy of the model with PEFT's adapter "as trained". `fields` are LoraConfig's."""
    base = copy.deepcopy(model)
    base.name_or_path = ""  # else PEFT writes the path into the config
    own = {"task_type": "CAUSAL_LM", "r": 4, "fan_in_fan_out": model.config.model_type == "gpt2"}
    with untouched_rng():
        peft_model = get_peft_model(base, LoraConfig(**{**own, **fields}))
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator_of(seed, name)) * 0.2
            parameter.data.copy_(noise if "lora_" in name else parameter.data + noise)
            parameter.data = parameter.data.to(dtype)  # last: PEFT keeps what it trains in float32
    return peft_model.eval()


def make_lora(model: PreTrainedModel, path: Path, *, base: str | None = None, **fields: Any) -> Path:
    """Writes the adapter with PEFT's `save_pretrained`; the model stays as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`|Adapter 'default'|`lora_bias=True`")
        return save_adapter(trainable_lora(model, **fields), AdapterSpec(base_model_name_or_path=base), path)
