"""A stored blend of any adapters with any weights is the weighted sum of their deltas, also to PEFT.

Expected values are computed in float64 from the members' files alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from adapters.binding import check_layout
from adapters.blend import blend, weighted_sum
from adapters.checkpoint import TopKCheckpoint
from adapters.errors import InvalidSelection, ShapeMismatch
from adapters.export import write_files
from adapters.layers import AdaptedModel
from adapters.lora import LoRACheckpoint, ServedCheckpoint
from adapters.reading import AnyCheckpoint, as_served, read_adapter
from tests.dense import assert_deltas, dense_deltas, dense_extras, peft_deltas, peft_model, weighted_sum_of
from tests.factories import AdapterSpec, Arch, make_adapter, widen_adapter
from tests.families import (
    ARCHS,
    HIDDEN,
    WEIGHTS,
    Family,
    RawVBLoRA,
    base,
    families,
    raw_vblora,
    vbloras,
    written,
)
from tests.unit.adapters.support import adapted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def served(path: Path) -> ServedCheckpoint:
    return as_served(read_adapter(path))


def stored(checkpoint: AnyCheckpoint, path: Path) -> Path:
    path.mkdir()
    write_files(checkpoint, path)
    return path


def compact(path: Path) -> TopKCheckpoint:
    checkpoint = served(path)
    assert isinstance(checkpoint, TopKCheckpoint)
    return checkpoint


def in_files(members: Sequence[tuple[Path, float]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    return weighted_sum_of([(dense_deltas(path), weight) for path, weight in members])


FAR_APART = [
    (raw_vblora(), 1e-3),
    (raw_vblora(seed=1, topk=3, vector_length=6), 1e4),
    (raw_vblora(targets=("v_proj",)), -1e-3),
]
EXTREMES = [
    (raw_vblora(topk=1, num_vectors=1), 0.5),
    (raw_vblora(topk=5, num_vectors=5, vector_length=HIDDEN), -2.0),
    (raw_vblora(r=3 * HIDDEN, vector_length=1), 1.0),
    (raw_vblora(num_vectors=256, compact=False, dtype=torch.bfloat16, spread=30.0, topk=5), 0.0),
]


@settings(max_examples=120)
@example(FAR_APART)
@example(EXTREMES)
@example([(raw_vblora(), 0.0), (raw_vblora(targets=("o_proj",)), 0.0)])
@example([(raw_vblora(topk=3), 0.4), (raw_vblora(topk=3), 0.4), (raw_vblora(topk=3), -0.8)])
@given(families())
def test_a_blend_is_the_weighted_sum_in_one_file(family: Family) -> None:
    with written(family) as members, tempfile.TemporaryDirectory() as folder:
        path = stored(blend([(compact(path), weight) for path, weight in members]), Path(folder) / "blend")
        assert_deltas(dense_deltas(path), *in_files(members))
        blended = compact(path)
    drawn = [raw for raw, _ in family if isinstance(raw, RawVBLoRA)]
    assert blended.config.r == sum(raw.r for raw in drawn)
    assert blended.config.vector_length == math.gcd(*(raw.vector_length for raw in drawn))
    assert blended.config.topk == max(raw.topk for raw in drawn)
    assert_nothing_is_superfluous(blended)


def assert_nothing_is_superfluous(blended: TopKCheckpoint) -> None:
    """No two rows of the bank are equal, and each has weight somewhere, but for as many as topk itself needs."""
    referred = set(blended.indices.long()[blended.full_weights() > 0].tolist())
    distinct = len(blended.bank.vectors.unique(dim=0))
    assert blended.config.num_vectors == max(len(referred), blended.config.topk)
    assert distinct >= len(referred)
    ordered = blended.indices.long().sort(-1).values
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all())


@settings(max_examples=40)
@given(st.sampled_from(ARCHS).flatmap(vbloras), st.lists(WEIGHTS.filter(bool), min_size=2, max_size=3))
def test_versions_of_one_adapter_share_what_they_refer_to(raw: RawVBLoRA, weights: list[float]) -> None:
    """With one weight their rows are the same; with another sign B has them once more."""
    with written([(raw, 1.0)]) as [(path, _)]:
        one = compact(path)
    alone = blend([(one, weights[0])]).config.num_vectors
    assert blend([(one, weights[0])] * 3).config.num_vectors == alone
    assert blend([(one, abs(weight)) for weight in weights]).config.num_vectors <= len(set(map(abs, weights))) * alone
    assert blend([(one, -abs(weights[0]))]).config.num_vectors <= 2 * max(alone, one.config.topk)


@settings(max_examples=40)
@example(FAR_APART)
@example(EXTREMES)
@given(families(most=3))
def test_peft_loads_a_blend_and_its_deltas_are_the_weighted_sum(family: Family) -> None:
    with written(family) as members, tempfile.TemporaryDirectory() as folder:
        path = stored(blend([(compact(path), weight) for path, weight in members]), Path(folder) / "blend")
        assert_deltas(peft_deltas(family[0][0].arch, path), *in_files(members))


@settings(max_examples=60)
@given(families(with_lora=True))
def test_with_plain_lora_among_them_a_blend_is_a_lora(family: Family) -> None:
    with written(family) as members, tempfile.TemporaryDirectory() as folder:
        checkpoint = weighted_sum([(served(path), weight) for path, weight in members])
        assert isinstance(checkpoint, LoRACheckpoint)
        path = stored(checkpoint, Path(folder) / "blend")
        assert_deltas(dense_deltas(path), *in_files(members))
        assert_deltas(peft_deltas(family[0][0].arch, path), *in_files(members))
        assert checkpoint.config.lora_alpha == checkpoint.config.r
        assert {len(a) for a, _ in checkpoint.matrices.values()} == {checkpoint.config.r}


# --- trained biases and saved modules -------------------------------------------------------------


@settings(max_examples=60)
@given(families(extras=True, with_lora=True, most=3) | families(extras=True, most=3))
def test_trained_biases_and_saved_modules_are_weighted_differences(family: Family) -> None:
    """As PEFT has them after loading the blend, which we take again; where no file could hold them it says so."""
    arch = family[0][0].arch
    own = dict(base(arch).named_parameters(remove_duplicate=False))
    with written(family) as members, tempfile.TemporaryDirectory() as folder:
        checkpoints = [(served(path), weight) for path, weight in members]
        if one_saves_what_another_adapts(family):
            with pytest.raises(InvalidSelection, match="saved whole by one adapter and adapted by another"):
                weighted_sum(checkpoints, own.get)
            return
        path = stored(weighted_sum(checkpoints, own.get), Path(folder) / "blend")
        check_layout(read_adapter(path).layout, adapted_base(arch))
        model = peft_model(arch, path)
        expected = dense_extras(arch, members)
    got = parameters_in_peft(model)
    assert expected.keys() <= got.keys()
    scale = 1 + sum(abs(weight) for _, weight in family)
    for name, value in got.items():
        if name in expected:
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=2e-6 * scale)
        else:
            assert torch.equal(value, own[name]), name


@cache
def adapted_base(arch: Arch) -> AdaptedModel:
    return adapted(base(arch))


def one_saves_what_another_adapts(family: Family) -> bool:
    saved = tuple(name for raw, _ in family for name in raw.saved)
    return bool(saved) and any(layer.endswith(saved) for raw, _ in family for layer in raw.layers)


def parameters_in_peft(model: torch.nn.Module) -> dict[str, Tensor]:
    """What PEFT's model computes with beside the deltas, by the base's names."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        leaf = module
        if isinstance(module, BaseTunerLayer):
            leaf = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            leaf = module.modules_to_save["default"]
        elif "base_layer" in name or "modules_to_save" in name or "original_module" in name:
            continue
        for attribute, parameter in leaf.named_parameters(recurse=False):
            found[f"{name}.{attribute}"] = parameter.detach()
    return {name: value for name, value in found.items() if "lora" not in name}


@settings(max_examples=20)
@given(st.sampled_from(ARCHS).flatmap(partial(vbloras, extras=True)), WEIGHTS.filter(lambda weight: weight != 1.0))
def test_extras_without_their_base_are_refused(raw: RawVBLoRA, weight: float) -> None:
    with written([(raw, weight)]) as [(path, _)]:
        checkpoint = compact(path)
    if not checkpoint.extras:
        return
    with pytest.raises(InvalidSelection, match="name the base model"):
        blend([(checkpoint, weight)])
    with pytest.raises(ShapeMismatch, match="another shape"):
        blend([(checkpoint, weight)], lambda name: torch.zeros(5))
    alone = blend([(checkpoint, 1.0)])
    assert all(torch.equal(tensor, checkpoint.extras[key]) for key, tensor in alone.extras.items())
    assert alone.extras.keys() == checkpoint.extras.keys()


# --- algebra --------------------------------------------------------------------------------------


def deltas(checkpoint: ServedCheckpoint) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return dense_deltas(stored(checkpoint, Path(folder) / "stored"))


@settings(max_examples=40)
@given(families(most=3, with_lora=True) | families(most=3), WEIGHTS, WEIGHTS)
def test_a_blend_of_blends_is_the_flat_blend(family: Family, outer: float, other: float) -> None:
    with written(family) as members:
        inner = [(served(path), weight) for path, weight in members]
        nested = deltas(weighted_sum([(weighted_sum(inner), outer), (inner[0][0], other)]))
        flat = deltas(weighted_sum([*((each, outer * weight) for each, weight in inner), (inner[0][0], other)]))
        total, scale = in_files([*((path, outer * weight) for path, weight in members), (members[0][0], other)])
    assert_deltas(nested, total, scale, bound=4e-6)  # it was rounded twice
    assert_deltas(flat, total, scale)


@settings(max_examples=40)
@given(families(most=3, with_lora=True) | families(most=3))
def test_a_blend_and_its_negation_cancel(family: Family) -> None:
    with written(family) as members:
        blended = weighted_sum([(served(path), weight) for path, weight in members])
        _, scale = in_files(members)
    cancelled = deltas(weighted_sum([(blended, 1.0), (blended, -1.0)]))
    assert_deltas(cancelled, {name: torch.zeros_like(delta) for name, delta in cancelled.items()}, scale)


@settings(max_examples=40)
@given(families(most=2, with_lora=True) | families(most=2), st.data())
def test_weight_one_is_the_adapter_and_weight_zero_is_nothing(family: Family, data: st.DataObject) -> None:
    with written(family) as members:
        first, *_ = checkpoints = [served(path) for path, _ in members]
        own = dense_deltas(members[0][0])
    scale = {name: float(delta.abs().max()) for name, delta in own.items()}
    assert_deltas(deltas(weighted_sum([(first, 1.0)])), own, scale)
    place = data.draw(st.integers(0, 1))
    with_nothing = [(checkpoints[-1], 0.0)]
    with_nothing.insert(place, (first, 1.0))
    got = deltas(weighted_sum(with_nothing))
    for name in got.keys() - own.keys():
        assert not got.pop(name).any(), name
    assert_deltas(got, own, scale)


# --- of adapters that PEFT wrote ------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> AdapterSpec:
    return AdapterSpec(
        r=draw(st.integers(1, 4)),
        num_vectors=draw(st.sampled_from([3, 17, 300])),
        vector_length=draw(st.sampled_from([2, 4, 6, 12])),
        topk=draw(st.integers(1, 3)),
        compact=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        target_modules=draw(st.sampled_from(["all-linear", ["q_proj", "v_proj"], r".*\.0\..*(up|down)_proj"])),
        layers_to_transform=None,
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=15)
@given(st.lists(st.tuples(specs(), WEIGHTS), min_size=1, max_size=3))
def test_peft_agrees_with_itself_on_blends_of_what_it_wrote(family: list[tuple[AdapterSpec, float]]) -> None:
    """The sum of the deltas that PEFT says its own files have is what it says the blend has."""
    with tempfile.TemporaryDirectory() as folder:
        members = []
        for i, (spec, weight) in enumerate(family):
            path = make_adapter(base("llama"), spec, Path(folder) / f"{i}")
            # Compact files of 16 bits are ones that PEFT writes and cannot load.
            readable = path if spec.dtype is torch.float32 or not spec.compact else widen_adapter(path, path / "wide")
            members.append((path, readable, weight))
        expected = weighted_sum_of([(to_double(peft_deltas("llama", readable)), w) for _, readable, w in members])
        blended = stored(blend([(compact(path), weight) for path, _, weight in members]), Path(folder) / "blend")
        assert_deltas(peft_deltas("llama", blended), *expected)


def to_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}
