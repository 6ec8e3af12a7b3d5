"""The parameter count of an adapter, as PEFT's `get_nb_savable_parameters` counts it (PEFT 0.21.2).

In a compact checkpoint an index is counted as the part of a float32 that its width takes: a uint8 as a quarter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar

from adapters.config import VBLoRAConfig
from adapters.targets import LayerShape


class Storage(StrEnum):
    """How a checkpoint stores its adapter.

    VB-LoRA's selections as the k best vectors of each position or a logit for every vector; plain LoRA's factors.
    """

    TOPK = "topk"
    LOGITS = "logits"
    LORA = "lora"


@dataclass(frozen=True, slots=True)
class IndexWidth:
    """The integer type PEFT writes for indices into a bank, and its share of a float32 in the parameter count."""

    dtype: str
    float32_equivalents: float


def index_width(num_vectors: int) -> IndexWidth:
    if num_vectors < 2**8:
        return IndexWidth("uint8", 0.25)
    if num_vectors < 2**15:
        return IndexWidth("int16", 0.5)
    if num_vectors < 2**31:
        return IndexWidth("int32", 1)
    return IndexWidth("int64", 2)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """What an adapter stores. `vblora_params` is in float32-equivalents; `topk_…_params` are raw element counts.

    `full_logits_params` is `vblora_params` of the same adapter with full logits; `lora_params` is plain LoRA of the
    same rank on the same layers.
    """

    storage: Storage
    vblora_params: int
    other_params: int
    vector_bank_params: int
    logits_params: int
    logit_positions: int
    topk_indices_params: int
    topk_weights_params: int
    index_dtype: str
    full_logits_params: int
    lora_params: int
    r: int
    num_vectors: int
    vector_length: int
    topk: int

    @property
    def total_params(self) -> int:
        return self.vblora_params + self.other_params

    @property
    def summary(self) -> str:
        """The line that PEFT's `print_savable_parameters` prints, to the character."""
        return (
            f"VB-LoRA params to-be-saved (float32-equivalent): {self.vblora_params:,d} "
            f"|| total params to-be-saved: {self.total_params:,d}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, the total and the summary, as plain JSON values."""
        return {**asdict(self), "total_params": self.total_params, "summary": self.summary}


@dataclass(frozen=True, slots=True)
class LoRAParameterCount:
    """What a plain LoRA adapter stores; `r` is its config's, which single modules may differ from."""

    lora_params: int
    other_params: int
    r: int

    storage: ClassVar[Storage] = Storage.LORA

    @property
    def total_params(self) -> int:
        return self.lora_params + self.other_params

    @property
    def summary(self) -> str:
        return f"LoRA params to-be-saved: {self.lora_params:,d} || total params to-be-saved: {self.total_params:,d}"

    def to_dict(self) -> dict[str, Any]:
        """The keys of ParameterCount.to_dict(), those of VB-LoRA None."""
        own = {**asdict(self), "storage": self.storage, "total_params": self.total_params, "summary": self.summary}
        return {**dict.fromkeys(each.name for each in fields(ParameterCount)), **own}


def count_parameters(
    config: VBLoRAConfig, layers: Iterable[LayerShape], *, storage: Storage | None = None, other_params: int = 0
) -> ParameterCount:
    """The count for an adapter with `config` on `layers`, whether or not it exists.

    `storage` defaults to what the config saves. `other_params` are those outside VB-LoRA that the checkpoint stores.
    vector_length must divide the features of every layer; binding and reading see to that.
    """
    storage = storage or (Storage.TOPK if config.save_only_topk_weights else Storage.LOGITS)
    positions = lora = 0
    for layer in layers:
        features = layer.in_features + layer.out_features
        positions += config.r * (features // config.vector_length)
        lora += config.r * features
    width = index_width(config.num_vectors)
    bank = config.num_vectors * config.vector_length
    logits = positions * config.num_vectors
    indices, weights = positions * config.topk, positions * (config.topk - 1)
    compact = int(bank + weights + indices * width.float32_equivalents)
    return ParameterCount(
        storage=storage,
        vblora_params=compact if storage is Storage.TOPK else bank + logits,
        other_params=other_params,
        vector_bank_params=bank,
        logits_params=logits,
        logit_positions=positions,
        topk_indices_params=indices,
        topk_weights_params=weights,
        index_dtype=width.dtype,
        full_logits_params=bank + logits,
        lora_params=lora,
        r=config.r,
        num_vectors=config.num_vectors,
        vector_length=config.vector_length,
        topk=config.topk,
    )
