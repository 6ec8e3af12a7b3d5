"""An adapter in another storage is the same adapter, PEFT loads it, and its parameters count as PEFT counts them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import VBLoRAConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.blend import weighted_sum
from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint
from adapters.config import VBLoRAConfig
from adapters.export import converted, write_files
from adapters.lora import LoRACheckpoint
from adapters.parameters import Storage, count_parameters
from adapters.reading import AnyCheckpoint, as_served, read_adapter
from adapters.store import digest_of_files
from adapters.targets import LayerShape
from tests.dense import assert_deltas, dense_deltas, peft_deltas, peft_model
from tests.factories import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec, save_adapter, trainable_adapter
from tests.families import (
    ARCHS,
    HIDDEN,
    Family,
    Raw,
    RawVBLoRA,
    base,
    families,
    loras,
    raw_vblora,
    vbloras,
    written,
)
from tests.lora_factory import make_lora, trainable_lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

of_any_base = st.sampled_from(ARCHS)
raw_vbloras = of_any_base.flatmap(vbloras)
METADATA = {"blend": "a:0.5,b", "note": "of any length", "resumable": "false"}


def stored(checkpoint: AnyCheckpoint, path: Path) -> Path:
    path.mkdir()
    write_files(checkpoint, path, METADATA)
    return path


@settings(max_examples=40)
@example(raw_vblora(arch="gpt2", targets=("c_attn",), topk=1, num_vectors=1, vector_length=HIDDEN))
@example(raw_vblora(arch="gpt2", targets=("c_attn",), topk=5, num_vectors=5, spread=30.0, compact=False))
@example(raw_vblora(arch="gpt2", targets=("c_attn",), topk=5, num_vectors=40, spread=30.0, dtype=torch.bfloat16))
@example(
    raw_vblora(
        arch="gpt2", targets=("c_attn",), topk=3, num_vectors=256, spread=30.0, dtype=torch.float16, r=3 * HIDDEN
    )
)
@given(raw_vbloras)
def test_in_every_storage_it_is_the_same_and_peft_loads_it(drawn: RawVBLoRA) -> None:
    with written([(drawn, 1.0)]) as [(path, _)]:
        source, expected = read_adapter(path), dense_deltas(path)
        scale = {name: float(delta.abs().max()) for name, delta in expected.items()}
        for storage in Storage:
            exported = stored(converted(source, storage), path / storage)
            assert_deltas(dense_deltas(exported), expected, scale)
            assert_deltas(peft_deltas(drawn.arch, exported), expected, scale)
            assert read_adapter(exported).layout.parameters().storage is storage


@settings(max_examples=60)
@example(raw_vblora(seed=1, r=1, vector_length=8, topk=5, spread=6.0))  # of 6e-8 nothing comes back
@given(raw_vbloras)
def test_compact_to_logits_and_back_is_the_same(drawn: RawVBLoRA) -> None:
    """The same vectors of every position, with the same weights; those of weight 0 may be others."""
    with written([(drawn, 1.0)]) as [(path, _)]:
        compact = as_served(read_adapter(path))
    assert isinstance(compact, TopKCheckpoint)
    once = compact.to_logits()
    again = once.to_topk()
    assert torch.equal(again.bank.vectors, compact.bank.vectors)
    assert again.config == compact.config
    torch.testing.assert_close(spread_out(again), spread_out(compact), rtol=0, atol=3e-7)
    for logits, source in ((once, compact), (again.to_logits(), again)):
        assert isinstance(logits, LogitsCheckpoint)
        assert logits.resumable == (drawn.topk == drawn.num_vectors and bool((source.full_weights() > 0).all()))


def spread_out(checkpoint: TopKCheckpoint) -> Tensor:
    """Each position's weight of every vector of the bank."""
    weights = torch.zeros(len(checkpoint.indices), checkpoint.config.num_vectors)
    return weights.scatter_(-1, checkpoint.indices.long(), checkpoint.full_weights())


@settings(max_examples=60)
@given(raw_vbloras)
def test_lora_factors_are_the_composed_ones_to_the_bit(drawn: RawVBLoRA) -> None:
    with written([(drawn, 1.0)]) as [(path, _)], tempfile.TemporaryDirectory() as folder:
        compact = as_served(read_adapter(path))
        lora = read_adapter(stored(converted(compact, Storage.LORA), Path(folder) / "lora"))
    assert isinstance(lora, LoRACheckpoint)
    assert lora.config.r == lora.config.lora_alpha == drawn.r
    for layer, a, b_t in compact.factors():
        own_a, own_b = lora.matrices[layer.name]
        assert torch.equal(own_a, a)
        assert torch.equal(own_b, b_t.T)


raws = of_any_base.flatmap(partial(vbloras, extras=True)) | of_any_base.flatmap(partial(loras, extras=True))


@settings(max_examples=15)
@given(raws.filter(lambda raw: raw.dtype is torch.float32))
def test_the_files_drawn_are_those_that_peft_writes(drawn: Raw) -> None:
    """Loaded by PEFT and saved again they have the same tensors, and nearly the same values."""
    with written([(drawn, 1.0)]) as [(path, _)]:
        model = peft_model(drawn.arch, path)
        model.save_pretrained(str(path / "again"))
        first, again = (load_file(directory / WEIGHTS_FILE) for directory in (path, path / "again"))
    assert again.keys() == first.keys()
    for key, tensor in first.items():
        assert (tensor.shape, tensor.dtype) == (again[key].shape, again[key].dtype), key
        if "_topk_" not in key:
            assert torch.equal(tensor, again[key]), key


@settings(max_examples=60)
@given(raws)
def test_what_is_written_is_read_again(drawn: Raw) -> None:
    """Every tensor as it was; of compact weights, to what a float32 holds of them."""
    with written([(drawn, 1.0)]) as [(path, _)], tempfile.TemporaryDirectory() as folder:
        first = read_adapter(path)
        again = load_file(stored(first, Path(folder) / "again") / WEIGHTS_FILE)
        own = load_file(path / WEIGHTS_FILE)
    copies = {key for key in own if ".modules_to_save." in key or ".original_module." in key}
    assert again.keys() == own.keys() - copies
    for key, tensor in again.items():
        if key.endswith("_topk_weights"):
            wide = own[key].float()
            expected = wide / wide.sum(-1, keepdim=True).clamp_min(1)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2.4e-7)
        else:
            assert torch.equal(tensor, own[key]), key


@settings(max_examples=30)
@given(families(most=3) | families(most=3, with_lora=True))
def test_the_same_adapter_is_the_same_bytes_and_digest(family: Family) -> None:
    with written(family) as members, tempfile.TemporaryDirectory() as folder:
        digests = set()
        for i in range(3):
            checkpoints = [(as_served(read_adapter(path)), weight) for path, weight in members]
            path = stored(weighted_sum(checkpoints), Path(folder) / f"{i}")
            digests.add(digest(path))
            digests.add(digest(stored(read_adapter(path), Path(folder) / f"{i}, read and written")))
        assert len(digests) == 1


def digest(path: Path) -> str:
    return digest_of_files({name: path / name for name in (CONFIG_FILE, WEIGHTS_FILE)})


# --- counts ---------------------------------------------------------------------------------------


@st.composite
def countable(draw: st.DrawFn) -> tuple[VBLoRAConfig, list[LayerShape]]:
    length = draw(st.integers(1, 8))
    layers = [
        LayerShape(f"l{i}", length * draw(st.integers(1, 5)), length * draw(st.integers(1, 5)))
        for i in range(draw(st.integers(1, 4)))
    ]
    num_vectors = draw(st.integers(1, 600) | st.sampled_from([2**8 - 1, 2**8, 2**15 - 1, 2**15]))
    config = VBLoRAConfig(
        r=draw(st.integers(1, 9)),
        num_vectors=num_vectors,
        vector_length=length,
        topk=draw(st.integers(1, min(num_vectors, 6))),
        save_only_topk_weights=draw(st.booleans()),
        target_modules=tuple(layer.name for layer in layers),
    )
    return config, layers


@settings(max_examples=60)
@given(countable())
def test_any_config_counts_as_in_peft(drawn: tuple[VBLoRAConfig, list[LayerShape]]) -> None:
    config, layers = drawn
    with torch.device("meta"):
        model = nn.ModuleDict({each.name: nn.Linear(each.in_features, each.out_features) for each in layers})
    own = {
        "r": config.r, "num_vectors": config.num_vectors, "vector_length": config.vector_length, "topk": config.topk,
        "save_only_topk_weights": config.save_only_topk_weights, "target_modules": list(config.target_modules or ()),
    }  # fmt: skip
    theirs = get_peft_model(model, PeftConfig(**own), low_cpu_mem_usage=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        theirs.print_savable_parameters()
    count = count_parameters(config, layers)
    assert (count.vblora_params, 0) == theirs.get_nb_savable_parameters()
    assert count.summary == printed.getvalue().strip()


TARGETS = {"llama": ["q_proj", "up_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"]}
SAVED = {"llama": ["lm_head", "input_layernorm"], "qwen2": ["lm_head", "o_proj"], "gpt2": ["ln_1", "wpe"]}


@settings(max_examples=20)
@given(of_any_base, st.sampled_from(["none", "all", "only"]), st.booleans(), st.booleans(), st.data())
def test_biases_and_saved_modules_count_as_in_peft(
    arch: Any, bias: str, is_saved: bool, compact: bool, data: st.DataObject
) -> None:
    saved = SAVED[arch] if is_saved else None
    with tempfile.TemporaryDirectory() as folder:
        bias_of = {"only": "vblora_only"}.get(bias, bias)
        spec = AdapterSpec(
            target_modules=TARGETS[arch], bias=bias_of, modules_to_save=saved, compact=compact, vector_length=12,
            num_vectors=data.draw(st.sampled_from([5, 256])), r=data.draw(st.integers(1, 3)),
        )  # fmt: skip
        theirs = trainable_adapter(base(arch), spec)
        count = read_adapter(save_adapter(theirs, spec, Path(folder) / "vblora")).layout.parameters()
        assert (count.vblora_params, count.other_params) == theirs.get_nb_savable_parameters()
        fields = {
            "target_modules": TARGETS[arch],
            "modules_to_save": saved,
            "bias": {"only": "lora_only"}.get(bias, bias),
            "rank_pattern": data.draw(st.dictionaries(st.sampled_from(TARGETS[arch]), st.integers(1, 6))),
        }
        trained, _ = trainable_lora(base(arch), **fields).get_nb_trainable_parameters()
        lora = read_adapter(make_lora(base(arch), Path(folder) / "lora", **fields))
        assert lora.layout.parameters().total_params == trained
