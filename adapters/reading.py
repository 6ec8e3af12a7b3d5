"""The one door through which adapters of any type are read: VB-LoRA, compact or with full logits, and plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint, read_checkpoint
from adapters.config import VBLoRAConfig, parse_values, read_config
from adapters.errors import UnsupportedCheckpoint
from adapters.layout import AdapterLayout, read_layout
from adapters.lora import LoRACheckpoint, ServedCheckpoint, read_lora
from adapters.lora_config import LoRAConfig
from adapters.lora_layout import LoRALayout, lora_layout
from adapters.safetensors_header import WEIGHTS_FILE, RawHeader, parse_header, read_header
from adapters.tensor_file import tensors_in

AnyLayout = AdapterLayout | LoRALayout
AnyCheckpoint = TopKCheckpoint | LogitsCheckpoint | LoRACheckpoint


def read_adapter(directory: Path) -> AnyCheckpoint:
    """The checkpoint in a PEFT adapter directory, every tensor checked.

    Raises a CheckpointError that names the file, the field or the tensor at fault.
    """
    if _peft_type(directory) == VBLoRAConfig.PEFT_TYPE:
        return read_checkpoint(directory)
    layout = _read_lora_layout(directory)
    with tensors_in(directory) as read:
        return read_lora(layout, read)


def read_adapter_layout(directory: Path) -> AnyLayout:
    """The layout of a PEFT adapter directory, from its config and the header of its weights: no tensor is read.

    Adapters whose config and header are the same to the byte share one layout. Raises a CheckpointError.
    """
    if _peft_type(directory) == VBLoRAConfig.PEFT_TYPE:
        return read_layout(directory)
    return _read_lora_layout(directory)


def as_served(checkpoint: AnyCheckpoint) -> ServedCheckpoint:
    """The same adapter as small as it gets: compact if it has full logits."""
    return checkpoint.to_topk() if isinstance(checkpoint, LogitsCheckpoint) else checkpoint


def describe(checkpoint: AnyCheckpoint, warnings: list[str]) -> Mapping[str, Any]:
    """What the store keeps of an adapter besides its files, so that listing adapters opens none.

    Keys: `config` (PEFT's), `parameters` (ParameterCount.to_dict()), `target_modules` (the layers
    adapted), `resumable` (whether training can go on from it) and `warnings`.
    """
    return {
        "config": checkpoint.config.to_dict(),
        "parameters": checkpoint.layout.parameters().to_dict(),
        "target_modules": [layer.name for layer in checkpoint.layout.layers],
        "resumable": is_resumable(checkpoint),
        "warnings": warnings,
    }


def is_resumable(checkpoint: AnyCheckpoint) -> bool:
    """Whether training can go on from these files."""
    if isinstance(checkpoint, LogitsCheckpoint):
        return checkpoint.resumable
    return isinstance(checkpoint, LoRACheckpoint)


def _peft_type(directory: Path) -> str:
    peft_type = parse_values(read_config(directory)).get("peft_type")
    if peft_type not in (VBLoRAConfig.PEFT_TYPE, LoRAConfig.PEFT_TYPE):
        raise UnsupportedCheckpoint(
            f"peft_type is {peft_type!r}; this server takes VB-LoRA adapters ('VBLORA') and plain LoRA ones ('LORA')",
            subject="peft_type",
        )
    return str(peft_type)


def _read_lora_layout(directory: Path) -> LoRALayout:
    return _parsed_lora(read_config(directory), read_header(directory / WEIGHTS_FILE))


@lru_cache(maxsize=32)
def _parsed_lora(config: bytes, header: RawHeader) -> LoRALayout:
    return lora_layout(LoRAConfig.parse(config), parse_header(header))
