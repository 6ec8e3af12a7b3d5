"""Whatever the selections of its rows, a batch answers what base weights with dense deltas added in float64 answer.

So does a model with a selection folded in, and one that was merged offline.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from adapters.binding import check_layout, replaced_parameters
from adapters.factors import AdapterFactors, FactorStack, LayerFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.reading import as_served, read_adapter
from service.commands import merge
from service.commands.blend import WeightedDirectory
from service.commands.merge import MergeOptions
from tests.dense import dense_deltas, dense_parameters, own_parameters, weighted_sum_of
from tests.factories import Arch, save_model
from tests.families import (
    MILD_WEIGHTS,
    Family,
    base,
    families,
    raw_vblora,
    written,
)
from tests.unit.adapters.support import adapted, token_logits

PROMPT = list(b"laws")
MILD = (0.05, 0.3)  # stronger adapters saturate the attention, where rounding chooses what it reads

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def model_of(arch: Arch, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    model = adapted(base(arch), dtype)
    with model.finding_siblings():
        token_logits(model, [PROMPT])
    return model


@cache
def in_float64(arch: Arch) -> torch.nn.Module:
    return copy.deepcopy(base(arch)).double()


@torch.inference_mode()
def dense_logits(arch: Arch, members: Sequence[tuple[Path, float]]) -> Tensor:
    """Token logits of the base with what the members change added to its own parameters."""
    inputs = {"input_ids": torch.tensor([PROMPT]), "use_cache": False}
    changed = dense_parameters(arch, members)
    return functional_call(in_float64(arch), changed, kwargs=inputs, tie_weights=False).logits[0]


def factors_of(path: Path, model: AdaptedModel) -> AdapterFactors:
    checkpoint = as_served(read_adapter(path))
    check_layout(checkpoint.layout, model)
    layers = {layer.name: LayerFactors(a, b_t) for layer, a, b_t in checkpoint.factors()}
    return AdapterFactors(str(path), layers, replaced_parameters(checkpoint.extras, model.tensor))


def assert_logits(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=5e-5 * (1 + float(expected.abs().max())))


# --- rows of one batch ----------------------------------------------------------------------------

served_families = families(with_lora=True, extras=True, weights=MILD_WEIGHTS, strengths=MILD)
picks = st.lists(st.lists(MILD_WEIGHTS, min_size=4, max_size=4), min_size=1, max_size=4)


@settings(max_examples=40)
@given(served_families, picks, st.booleans())
def test_every_row_is_its_own_selection(family: Family, blends: list[list[float]], stays: bool) -> None:
    """The base, each adapter alone and blends of them in one forward: as alone, and as dense weights say.

    In a stack that stays, factors lie over the remains of others.
    """
    arch = family[0][0].arch
    model = model_of(arch)
    with written(family) as members:
        present = [factors_of(path, model) for path, _ in members]
        stack = used_stack(model, present) if stays else None
        alone = torch.eye(len(present)).tolist()
        rows = [[0.0] * len(present), *alone, *(blend[: len(present)] for blend in blends)]
        together = token_logits(model, [PROMPT] * len(rows), LowRankBatch(present, torch.tensor(rows), stack))
        for row, weights in enumerate(rows):
            solo = token_logits(model, [PROMPT], LowRankBatch(present, torch.tensor([weights])))[0]
            torch.testing.assert_close(together[row], solo, rtol=0, atol=2e-5 * (1 + float(solo.abs().max())))
            selected = [(path, weight) for (path, _), weight in zip(members, weights, strict=True)]
            assert_logits(together[row], dense_logits(arch, selected))


def used_stack(model: AdaptedModel, adapters: Sequence[AdapterFactors]) -> FactorStack:
    """One that has held namesakes of these adapters, in other places."""
    stack = FactorStack(model.siblings)
    for turn in range(3):
        first = turn % len(adapters)
        turned = [*adapters[first:], *adapters[:first]]
        stack.hold([replace(adapter, digest=f"{turn} {adapter.digest}") for adapter in turned])
    return stack


# --- folded ---------------------------------------------------------------------------------------


SAVED_AND_ADAPTED = [
    (raw_vblora(targets=("q_proj",), saved=("lm_head",), dtype=torch.bfloat16), 0.3),
    (raw_vblora(targets=("lm_head",), strength=0.1, seed=1), 1.0),
]


@settings(max_examples=60)
@example(SAVED_AND_ADAPTED, torch.bfloat16)
@given(families(with_lora=True, extras=True, weights=MILD_WEIGHTS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_fold_is_the_dense_sum_rounded_once_and_restoring_is_exact(family: Family, dtype: torch.dtype) -> None:
    arch = family[0][0].arch
    model = model_of(arch, dtype)
    before = {name: p.detach().clone() for name, p in parameters(model).items()}
    merger = Merger(model)
    with written(family) as members:
        selection = [(factors_of(path, model), weight) for path, weight in members]
        merger.fold(selection)
        folded = {name: p.detach().clone() for name, p in parameters(model).items()}
        report = merger.rounding(selection)
        expected = dense_parameters(arch, members, dtype)
        changes, scale = weighted_sum_of([(dense_deltas(path), weight) for path, weight in members])
        magnitude = magnitudes(arch, members, dtype)
    merger.restore()
    assert_same(parameters(model), before)
    for name, parameter in folded.items():
        if name not in expected:
            assert torch.equal(parameter, before[name]), name
            continue
        error = (parameter.double() - expected[name]).abs()
        assert bool((error <= spacing(parameter) / 2 + 1e-6 * magnitude[name]).all()), name
    if not all(float(delta.abs().max()) > 1e-3 * scale[name] for name, delta in changes.items() if scale[name]):
        return  # what members cancel to is float32's noise
    errors = {name: merge_error(folded[f"{name}.weight"], expected[f"{name}.weight"], d) for name, d in changes.items()}
    slack = 5e-6
    if any(raw.saved for raw, _ in family):  # W is itself a sum then, which the report has in float32
        sizes = [float(expected[f"{name}.weight"].norm() / d.norm()) for name, d in changes.items() if d.any()]
        slack += 2.0**-23 * max(sizes, default=0.0)
    assert report.merge_error == pytest.approx(max(errors.values()), rel=1e-3, abs=slack)
    if report.layer is not None:
        assert errors[report.layer] == pytest.approx(max(errors.values()), rel=1e-3, abs=slack)


def merge_error(folded: Tensor, expected: Tensor, delta: Tensor) -> float:
    """‖fold(W) − W − Δ‖ / ‖Δ‖ in float64; 0 where Δ is."""
    scale = float(delta.norm())
    return float((folded.double() - expected).norm()) / scale if scale else 0.0


def spacing(tensor: Tensor) -> Tensor:
    """From each number to the next of its dtype."""
    _, exponent = torch.frexp(tensor.double())
    return torch.finfo(tensor.dtype).eps * 2.0 ** (exponent - 1)


def parameters(model: AdaptedModel) -> dict[str, Tensor]:
    """By the base's names, those that are tied under each."""
    named = model.model.named_parameters(remove_duplicate=False)
    return {name.replace("base_layer.", ""): parameter for name, parameter in named}


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def magnitudes(arch: Arch, members: Sequence[tuple[Path, float]], dtype: torch.dtype) -> dict[str, float]:
    """`max |W0| + Σ |w| · max |what it adds|`: what float32's rounding of a sum is measured by."""
    own = own_parameters(arch, dtype)
    sizes = {name: float(value.abs().max()) for name, value in own.items()}
    for path, weight in members:
        for name, value in dense_parameters(arch, [(path, 1.0)], dtype).items():
            sizes[name] += abs(weight) * float((value - own[name]).abs().max())
    return sizes


# --- merged offline -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Arch, torch.dtype], Path]:
    """The base's directory in a dtype, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def directory(arch: Arch, dtype: torch.dtype) -> Path:
        return save_model(copy.deepcopy(base(arch)).to(dtype), folder / f"{arch} {dtype}")

    return directory


@settings(max_examples=16)
@example(SAVED_AND_ADAPTED, torch.bfloat16)
@given(
    families(with_lora=True, extras=True, most=3, weights=MILD_WEIGHTS),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_an_offline_merge_is_the_fold_in_memory(
    bases: Callable[[Arch, torch.dtype], Path], family: Family, dtype: torch.dtype
) -> None:
    arch = family[0][0].arch
    model = model_of(arch, dtype)
    merger = Merger(model)
    with written(family) as members, tempfile.TemporaryDirectory() as folder:
        selection = [(factors_of(path, model), weight) for path, weight in members]
        merger.fold(selection)
        folded = {name: p.detach().clone() for name, p in parameters(model).items()}
        expected = merger.rounding(selection)
        merger.restore()
        magnitude = magnitudes(arch, members, dtype)
        report, merged = merged_offline(bases(arch, dtype), members, Path(folder) / "out")
    if expected.merge_error < 0.5:  # else members may have cancelled to noise, whose loss is another each time
        assert report["merge_error"] == pytest.approx(expected.merge_error, rel=1e-2, abs=5e-6)
    assert folded.keys() - merged.keys() <= {"lm_head.weight"}
    if "lm_head.weight" not in merged:
        assert torch.equal(folded["lm_head.weight"], folded["transformer.wte.weight"]), "they are one still"
    for name, value in merged.items():
        assert value.dtype is dtype
        difference = (value.double() - folded[name].double()).abs()
        assert bool((difference <= spacing(value) + 1e-6 * magnitude[name]).all()), name


def merged_offline(
    directory: Path, members: Sequence[tuple[Path, float]], output: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `vblora-serve merge` says, and the parameters that it writes."""
    chosen = tuple(WeightedDirectory(path, weight) for path, weight in members)
    options = MergeOptions(str(directory), chosen, output, "auto", 1 << 30, (), as_json=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        assert merge.run(options) == 0
    report = json.loads(printed.getvalue())
    return report, {name: tensor for file in report["files"] for name, tensor in load_file(output / file).items()}
