"""The model of a receipt as transformers and PEFT make it: none of the server's own arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.blend import weighted_sum
from adapters.checkpoint import TopKCheckpoint
from adapters.export import write_adapter
from adapters.reading import AnyCheckpoint, as_served, read_adapter
from service.commands import CommandError
from service.engine.selection import Mode

WeightedDirectory = tuple[Path, float]


def check_peft() -> None:
    """Raises CommandError if PEFT is not installed."""
    if find_spec("peft") is None:
        raise CommandError("PEFT recomputes adapters, and it is not installed: pip install 'vblora-serve[replay]'")


def with_adapters(model: Any, adapters: Sequence[WeightedDirectory], mode: str, scratch: Path) -> Any:
    """The base model with a selection's adapters loaded by PEFT, which also folds them in if that is what ran.

    One adapter of weight 1 is loaded as it is; a blend, as one adapter that equals it, written into `scratch`.
    Changes the model. Raises AdapterError for adapters that are refused.
    """
    if not adapters:
        return model
    from peft import PeftModel  # optional, and slow to import

    directory = _one_adapter(model, adapters, scratch / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries have to tell each other
        loaded = PeftModel.from_pretrained(model, str(directory), torch_device=str(model.device)).eval()
    if mode == Mode.MERGE:
        loaded.merge_adapter()
    return loaded


def _one_adapter(model: Any, adapters: Sequence[WeightedDirectory], written: Path) -> Path:
    """A directory that PEFT loads: that of the only adapter, or one written anew."""
    checkpoints = [(read_adapter(directory), weight) for directory, weight in adapters]
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        if not _is_compact_in_16_bit(checkpoints[0][0]):
            return adapters[0][0]
        write_adapter(checkpoints[0][0], written)
    else:
        members = [(as_served(checkpoint), weight) for checkpoint, weight in checkpoints]
        write_adapter(weighted_sum(members, dict(model.named_parameters()).get), written)
    return written


def _is_compact_in_16_bit(checkpoint: AnyCheckpoint) -> bool:
    """PEFT cannot load these. What is written instead has the same values, its weights in float32."""
    return isinstance(checkpoint, TopKCheckpoint) and checkpoint.weights.dtype != torch.float32


def continuation(model: Any, device: torch.device) -> Callable[[Sequence[int]], Tensor]:
    """One text through the model, a part at a time; returns the token logits [vocabulary] behind each, float32."""
    cache: Any = None

    @torch.inference_mode()
    def continue_with(token_ids: Sequence[int]) -> Tensor:
        nonlocal cache
        ids = torch.tensor([list(token_ids)], device=device)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token_logits: Tensor = output.logits[0, -1].float().cpu()
        return token_logits

    return continue_with
