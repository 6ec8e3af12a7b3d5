"""An adapter as vLLM takes it: plain LoRA without anything besides its factors.

What vLLM 0.33.0 takes (vllm/lora/peft_helper.py, lora_model.py, utils.py): a config with `r`, `lora_alpha` and
`target_modules`, `bias: none`, no saved modules (but a classification head), none of LoRA's variants; of tensors, only
`….lora_A.weight` and `….lora_B.weight`, and the base's embeddings under `base_layer`, which it passes over.
"""

from __future__ import annotations

from dataclasses import replace

from adapters.errors import UnsupportedCheckpoint
from adapters.layout import EMBEDDING_NAMES, called_for, extra_owner
from adapters.lora import LoRACheckpoint, stack_lora
from adapters.lora_layout import LoRALayout
from adapters.reading import AnyCheckpoint, AnyLayout, as_served


def check_takeable(layout: AnyLayout) -> None:
    """Raises UnsupportedCheckpoint for trained biases and saved modules: left out, the adapter would answer wrongly."""
    if layout.config.modules_to_save:
        raise _besides(f"saves modules ({', '.join(layout.config.modules_to_save)})", "modules_to_save")
    for spec in layout.extras:
        if called_for(layout.config, spec, layout.layer_names):
            raise _besides(f"trains {spec.key!r}", spec.key)
        if not _is_base_embedding(spec.key):
            # An embedding that PEFT saved unasked, as it does when the vocabulary was resized.
            raise _besides(f"brings {spec.key!r}", spec.key)


def _besides(what: str, subject: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"the adapter {what} besides its LoRA, which vLLM cannot serve per request; merge it into the base "
        "(vblora-serve merge) and serve that",
        subject=subject,
    )


def _is_base_embedding(key: str) -> bool:
    """The base's own weight, which PEFT saves with an embedding that the adapter adapts; vLLM has it already."""
    return key.endswith(".base_layer.weight") and extra_owner(key).rpartition(".")[2] in EMBEDDING_NAMES


def as_vllm_takes(checkpoint: AnyCheckpoint) -> LoRACheckpoint:
    """The adapter's exact plain LoRA. Raises UnsupportedCheckpoint as `check_takeable` does.

    One that is plain LoRA already keeps its dtype, unless it has a `rank_pattern` or `alpha_pattern`: not every
    release of vLLM reads those, so their meaning goes into the factors.
    """
    check_takeable(checkpoint.layout)
    compact = as_served(checkpoint)
    if not isinstance(compact, LoRACheckpoint) or compact.config.rank_pattern or compact.config.alpha_pattern:
        compact = stack_lora([(compact, 1.0)])
    config = replace(compact.config, bias="none")  # there are none, or it would have been refused
    return LoRACheckpoint(LoRALayout.of(config, compact.layout.layers), compact.matrices)
