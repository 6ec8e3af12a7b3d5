"""Trained biases and saved modules, mixed in one batch and folded, against PEFT."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.binding import BaseIdentity
from adapters.errors import ShapeMismatch
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.registry import AdapterRegistry
from adapters.replacements import blended, is_replaceable
from adapters.store import AdapterStore
from adapters.targets import BaseModules
from tests.factories import AdapterSpec, Arch, make_adapter, peft_logits, peft_reference, rewrite, tiny_model

PROMPT = list(b"The quick brown fox")

SPECS: dict[Arch, list[AdapterSpec]] = {
    "llama": [
        AdapterSpec(seed=1, modules_to_save=["lm_head"]),
        AdapterSpec(seed=2, target_modules=["q_proj", "lm_head"]),
        AdapterSpec(seed=3, modules_to_save=["embed_tokens"]),
        AdapterSpec(seed=4, modules_to_save=["norm"]),  # PEFT: every module whose name ends so, input_layernorm too
        AdapterSpec(seed=5),
    ],
    "qwen2": [AdapterSpec(seed=1, bias="vblora_only"), AdapterSpec(seed=2, bias="all"), AdapterSpec(seed=3)],
    "gpt2": [  # its embeddings are tied
        AdapterSpec(seed=1, bias="all"),
        AdapterSpec(seed=2, modules_to_save=["lm_head"]),
        AdapterSpec(seed=3, modules_to_save=["ln_f", "wte"]),
        AdapterSpec(seed=4, modules_to_save=["wpe"]),
        AdapterSpec(seed=5, bias="vblora_only", compact=False),
        AdapterSpec(seed=6, bias="all", modules_to_save=["ln_1", "mlp.c_fc"]),
    ],
    "opt": [
        AdapterSpec(seed=1, bias="all", target_modules=["q_proj", "fc1"]),
        AdapterSpec(seed=2, modules_to_save=["fc2"]),
    ],
}


@dataclass(frozen=True)
class Case:
    """A wrapped base, its adapters' factors, and the token logits that PEFT answers with each."""

    model: PreTrainedModel
    adapted: AdaptedModel
    registry: AdapterRegistry
    factors: list[AdapterFactors]
    expected: list[Tensor]

    def token_logits(self, batch: LowRankBatch | None, rows: int = 1) -> Tensor:
        with torch.inference_mode(), self.adapted.using(batch):
            ids = torch.tensor([PROMPT]).expand(rows, -1)
            answered: Tensor = self.adapted.model(input_ids=ids, use_cache=False).logits
        return answered


@pytest.fixture(scope="module", params=list(SPECS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    arch: Arch = request.param
    folder = tmp_path_factory.mktemp(arch)
    model = tiny_model(arch)
    base = copy.deepcopy(model)
    modules = BaseModules.of(base, model_type=arch, output_layer=base.get_output_embeddings())
    adapted = AdaptedModel(base, modules)
    store = AdapterStore(folder / "data")
    registry = AdapterRegistry(
        store, adapted, BaseIdentity(frozenset()), factor_budget=1 << 30, device=torch.device("cpu")
    )
    factors, expected = [], []
    for i, spec in enumerate(SPECS[arch]):
        adapter = make_adapter(model, spec, folder / f"adapter-{i}")
        factors.append(registry.pin(register(registry, f"adapter-{i}", adapter)))
        expected.append(peft_logits(peft_reference(model, adapter), PROMPT))
    yield Case(model, adapted, registry, factors, expected)
    store.close()


def register(registry: AdapterRegistry, name: str, adapter: Path) -> str:
    with registry.store.staging() as staged:
        for file in adapter.iterdir():
            shutil.copy(file, staged / file.name)
        return registry.register("", name, staged).digest


def test_every_row_of_a_mixed_batch_is_pefts(case: Case) -> None:
    rows = len(case.factors) + 1  # the last one runs the base
    weights = torch.eye(rows)[:, :-1]
    answered = case.token_logits(LowRankBatch(case.factors, weights), rows)
    for row, expected in enumerate(case.expected):
        assert torch.allclose(answered[row], expected, atol=1e-4), f"row {row}"
    assert torch.equal(answered[-1], case.token_logits(None, rows)[-1]), "the base's row"


def test_one_adapter_for_every_row_is_pefts(case: Case) -> None:
    for factors, expected in zip(case.factors, case.expected, strict=True):
        answered = case.token_logits(LowRankBatch([factors], torch.ones(1, 1)), rows=2)
        assert torch.allclose(answered[0], expected, atol=1e-4)
        assert torch.allclose(answered[1], expected, atol=1e-4)


def test_folded_is_pefts_and_restoring_is_bit_exact(case: Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.adapted.model.state_dict().items()}
    merger = Merger(case.adapted)
    for factors, expected in zip(case.factors, case.expected, strict=True):
        merger.fold([(factors, 1.0)])
        assert torch.allclose(case.token_logits(None)[0], expected, atol=1e-4)
    merger.restore()
    after = case.adapted.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_blend_is_the_weighted_difference_from_the_base(case: Case) -> None:
    """In the same row as folding the same blend, which works on dense parameters."""
    pairs = list(zip(case.factors[:2], (0.7, -0.4), strict=True))
    weights = torch.tensor([[weight for _, weight in pairs], [0.0, 1.0]])
    answered = case.token_logits(LowRankBatch([factors for factors, _ in pairs], weights), rows=2)
    merger = Merger(case.adapted)
    merger.fold(pairs)
    folded = case.token_logits(None)[0]
    merger.restore()
    assert torch.allclose(answered[0], folded, atol=1e-4)
    assert torch.allclose(answered[1], case.expected[1], atol=1e-4)


def test_some_rows_do_replace_something(case: Case) -> None:
    assert any(factors.replaced for factors in case.factors)


def test_what_equals_the_base_replaces_nothing(case: Case) -> None:
    if case.model.config.model_type == "llama":
        assert not case.factors[1].replaced, "PEFT stores a targeted lm_head's own weight beside its logits"


def test_a_resized_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = copy.deepcopy(model)
    adapted = AdaptedModel(base, BaseModules.of(base, model_type="llama"))
    adapter = make_adapter(model, AdapterSpec(modules_to_save=["embed_tokens"]), tmp_path / "adapter")
    key = "base_model.model.model.embed_tokens.weight"
    resized = rewrite(adapter, tmp_path / "resized", tensors=lambda t: t.update({key: torch.zeros(280, 64)}))
    registry = AdapterRegistry(
        AdapterStore(tmp_path / "data"),
        adapted,
        BaseIdentity(frozenset()),
        factor_budget=1 << 30,
        device=torch.device("cpu"),
    )
    with pytest.raises(ShapeMismatch, match="vocabulary"):
        register(registry, "resized", resized)


def test_only_leaves_that_map_tokens_alone_are_replaceable() -> None:
    assert is_replaceable(nn.Linear(2, 3))
    assert is_replaceable(nn.LayerNorm(2))
    assert is_replaceable(nn.Embedding(4, 2))
    assert not is_replaceable(nn.Sequential(nn.Linear(2, 2)))
    assert not is_replaceable(nn.Conv1d(2, 2, 1))
    assert not is_replaceable(nn.ReLU())


def test_a_single_part_is_taken_exactly_and_sums_are_made_in_float32() -> None:
    own, part = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1.5, dtype=torch.bfloat16)
    assert blended(own, [(part, 1.0)]) is part
    assert torch.equal(blended(own, [(part, 0.5)]), torch.full((3,), 1.25, dtype=torch.bfloat16))
    assert blended(own, []) is own
