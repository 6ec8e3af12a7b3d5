"""From an adapter as it is stored to what a model, or a part of it, computes with."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapters.binding import replaced_parameters
from adapters.checkpoint import TopKCheckpoint
from adapters.cuts import factors_of
from adapters.factors import AdapterFactors, LayerFactors
from adapters.layers import AdaptedModel
from adapters.lora import ServedCheckpoint
from adapters.shared_banks import SharedBanks


@torch.inference_mode()
def composed(
    digest: str, checkpoint: ServedCheckpoint, model: AdaptedModel, banks: SharedBanks, device: torch.device
) -> AdapterFactors:
    """The factors of an adapter for the parts of the layers that `model` holds, on its device."""
    replaced = replaced_parameters(checkpoint.extras, model.tensor, model.cuts)
    source, bank = checkpoint, None
    if isinstance(source, TopKCheckpoint):
        bank = banks.on_device(source.bank)
        source = replace(source, bank=bank)
    layers = {layer.name: LayerFactors(a, b_t) for layer, a, b_t in factors_of(source, model.cuts, device)}
    here = {
        name: {attribute: tensor.to(device) for attribute, tensor in parameters.items()}
        for name, parameters in replaced.items()
    }
    selections = source if isinstance(source, TopKCheckpoint) else None
    return AdapterFactors(digest, layers, here, bank, selections, checkpoint if model.cuts else None)
