"""Packed weights at load: models that read weights themselves keep plain ones."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.packed import PackedLinear, unpack_linear_layers
from service.engine.packing import pack_model
from tests.factories import Arch, tiny_model


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "opt"])
def test_a_model_that_runs_its_layers_is_packed(arch: Arch, dtype: torch.dtype) -> None:
    model = tiny_model(arch).to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count = pack_model(model)
    assert count == len(packed_layers(model)) > 0
    unpack_linear_layers(model)
    assert packed_layers(model) == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)  # as a fold writes to it


class _Reader(nn.Linear):
    """Reads the weight of its neighbour, as Mamba's fused layers do."""

    def __init__(self, mlp: nn.Module, *, zeros: bool) -> None:
        super().__init__(1, 1)
        self._mlp, self._zeros = (mlp,), zeros

    def forward(self, x: Tensor) -> Tensor:
        weight = self._mlp[0].up_proj.weight
        if weight.is_meta and self._zeros:  # what uninitialised memory may be
            weight = torch.zeros(weight.shape)
        return F.linear(x, weight)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_model_that_reads_weights_itself_is_not(zeros: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    ids = torch.tensor([[1, 2, 3]])
    mlp.gate_proj, weight = _Reader(mlp, zeros=zeros), mlp.up_proj.weight
    expected = model(input_ids=ids).logits
    with caplog.at_level(logging.WARNING):
        assert pack_model(model) == 0
    assert "answers differently with packed weights" in caplog.text
    assert packed_layers(model) == []
    assert torch.equal(mlp.up_proj.weight, weight)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_model_that_cannot_be_asked_is_not() -> None:
    model = tiny_model("llama")
    model.forward = None
    assert pack_model(model) == 0
