"""Nothing drifts: after a thousand merges and restores in bfloat16, the base answers with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.binding import replaced_parameters
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.merge import Merger
from tests.factories import AdapterSpec, Arch, make_adapter, tiny_model
from tests.unit.adapters.support import PROMPT, adapted, compact, factors, token_logits

CYCLES = 1000
CHECKED_EVERY = 50


def log_probabilities(model: AdaptedModel) -> Tensor:
    return token_logits(model, [PROMPT]).log_softmax(-1)


@pytest.mark.parametrize(("arch", "packed"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_a_thousand_merges_and_restores_change_no_bit(arch: Arch, packed: bool, tmp_path: Path) -> None:
    """Adapters and blends by turns: the shared output layer adapted and saved, biases, norms, negative weights."""
    base = tiny_model(arch, tie_word_embeddings=True)
    first, norm = ("c_attn", "ln_1") if arch == "gpt2" else ("q_proj", "input_layernorm")
    model = adapted(base, torch.bfloat16, packed=packed)
    specs = {
        "head": AdapterSpec(seed=1, target_modules=[first, "lm_head"]),
        "saved": AdapterSpec(seed=2, r=2, modules_to_save=[norm, "lm_head"]),
        "biases": AdapterSpec(seed=3, topk=3, bias="all", target_modules="all-linear"),
    }
    adapters = []
    for name, spec in specs.items():
        # PEFT's own handling of a shared layer that is a target is not under test: it is trained on an untied model.
        source = tiny_model(arch, tie_word_embeddings=name != "head")
        path = make_adapter(source, spec, tmp_path / name)
        replaced = replaced_parameters(compact(path).extras, model.tensor)
        adapters.append(AdapterFactors(name, factors(path).layers, replaced))
    head, saved, biases = adapters
    selections = [
        [(head, 1.0)],
        [(saved, 1.0)],
        [(biases, 1.0)],
        [(head, 0.7), (biases, -0.3)],
        [(saved, 0.5), (head, 0.5), (biases, 1.3)],
    ]
    before, output = log_probabilities(model), model.base_layer("lm_head")
    shared = output.weight
    folded_answers = []

    merger = Merger(model)
    for cycle in range(CYCLES):
        merger.fold(selections[cycle % len(selections)])
        if cycle < len(selections):
            folded_answers.append(log_probabilities(model))
        if cycle % 3:  # else the next fold restores
            merger.restore()
            if cycle % CHECKED_EVERY == 1:
                assert torch.equal(log_probabilities(model), before), f"after {cycle + 1} merges"
    merger.restore()

    assert torch.equal(log_probabilities(model), before)
    assert output.weight is shared
    assert packed or model.model.get_input_embeddings().weight is shared
    for answer in folded_answers:
        assert not torch.equal(answer, before), "every fold was one"
    for selection, answer in zip(selections, folded_answers, strict=True):
        merger.fold(selection)
        assert torch.equal(log_probabilities(model), answer), "a fold is the same one each time, too"
