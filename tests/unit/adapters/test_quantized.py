"""Quantized layers are known by what they hold, not by their class."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.errors import MergeUnsupported
from adapters.factors import AdapterFactors, LayerFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.quantized import holds_quantized, is_quantized
from adapters.targets import BaseModules, adaptable_shape


class PackedLinear(nn.Module):
    """As some libraries have them: no nn.Linear, no `weight`, integers and scales in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight * self.scales)


class Gate(nn.Module):
    """Says features, and is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).softmax(-1)


class TwoInputs(PackedLinear):
    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        return F.linear(x, self.qweight * self.scales) * route


def packed_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(PackedLinear(nn.Linear(8, 16, bias=False)), nn.Linear(16, 4, bias=False))


def wrapped(model: nn.Module) -> AdaptedModel:
    return AdaptedModel(model, BaseModules.of(model, model_type="packed"))


def some_factors() -> AdapterFactors:
    return AdapterFactors("some", {"0": LayerFactors(torch.randn(2, 8), torch.randn(2, 16))})


def test_a_packed_layer_takes_part_by_its_shape() -> None:
    layer = packed_model()[0]
    assert adaptable_shape(layer) == (8, 16)
    assert holds_quantized(layer)
    assert not holds_quantized(packed_model()[1])


@pytest.mark.parametrize("module", [Gate(), TwoInputs(nn.Linear(8, 4)), nn.Bilinear(8, 8, 4), nn.Identity()])
def test_what_only_says_features_does_not(module: nn.Module) -> None:
    assert adaptable_shape(module) is None


def test_an_adapter_runs_beside_it() -> None:
    model, x = packed_model(), torch.randn(3, 5, 8)
    plain, adapter = copy.deepcopy(model), some_factors()
    adapted = wrapped(model)
    with torch.inference_mode(), adapted.using(LowRankBatch([adapter], torch.tensor([[0.0], [1.0], [0.5]]))):
        answer = adapted.model(x)
    factors = adapter.layers["0"]
    weights = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1)
    expected = plain[1](plain[0](x) + weights * (x @ factors.a.T @ factors.b_t))
    torch.testing.assert_close(answer, expected)


def test_nothing_is_folded_into_it() -> None:
    merger = Merger(wrapped(packed_model()))
    with pytest.raises(MergeUnsupported, match="'0' is quantized") as refused:
        merger.fold([(some_factors(), 1.0)])
    assert (refused.value.code, refused.value.subject) == ("merge_unsupported", "mode")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_numbers_are_quantized(dtype: torch.dtype) -> None:
    assert is_quantized(nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_numbers_are_not(dtype: torch.dtype) -> None:
    assert not is_quantized(nn.Parameter(torch.zeros(2, 2, dtype=dtype)))
    assert not is_quantized(torch.zeros(2, 2, dtype=dtype))
