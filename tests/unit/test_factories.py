"""The factories do what other tests rely on: strong, reproducible, and exactly what PEFT writes and loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.factories import (
    CONFIG_FILE,
    VOCAB_SIZE,
    WEIGHTS_FILE,
    AdapterSpec,
    Arch,
    byte_tokenizer,
    make_adapter,
    peft_greedy,
    peft_logits,
    peft_reference,
    rewrite,
    save_model,
    tiny_model,
    trainable_adapter,
    widen_adapter,
)
from tests.fixtures import Fixture, recorded_fixtures

ARCHS = get_args(Arch)
PROMPT = list(b"The quick brown fox")
LEAST_VARIETY = {"qwen3": 7, "gemma2": 3}  # their norms leave little of random weights; tests of them sample as well
WITHOUT_BIASES = ("llama", "qwen3", "gemma2")
EVERY_BYTE_LENGTH = "héllo, wörld — 你好 🙂\n\ttabs,  two spaces , and <bos-like> text ."


class TestByteTokenizer:
    def test_any_text_round_trips(self):
        tokenizer = byte_tokenizer()
        ids = tokenizer.encode(EVERY_BYTE_LENGTH)
        assert ids == list(EVERY_BYTE_LENGTH.encode())
        assert tokenizer.decode(ids) == EVERY_BYTE_LENGTH

    def test_all_256_bytes_are_tokens_and_ids_fit_the_vocabulary(self):
        tokenizer = byte_tokenizer()
        assert sorted(tokenizer.get_vocab().values()) == list(range(259))
        assert len(tokenizer) <= VOCAB_SIZE

    @pytest.mark.parametrize("arch", ARCHS)
    def test_survives_saving_beside_a_model(self, arch: Arch, tmp_path: Path):
        tokenizer = AutoTokenizer.from_pretrained(save_model(tiny_model(arch), tmp_path))
        assert tokenizer.decode(tokenizer.encode(EVERY_BYTE_LENGTH)) == EVERY_BYTE_LENGTH
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
        chat = [{"role": "user", "content": "hi"}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert prompt == "user: hi\nassistant: "


@pytest.mark.parametrize("arch", ARCHS)
class TestTinyModel:
    def test_same_seed_same_model_and_the_random_state_is_left_alone(self, arch: Arch):
        state = torch.get_rng_state()
        first, second, other = (tiny_model(arch, seed) for seed in (3, 3, 4))
        assert torch.equal(peft_logits(first, PROMPT), peft_logits(second, PROMPT))
        assert not torch.equal(peft_logits(first, PROMPT), peft_logits(other, PROMPT))
        assert torch.equal(torch.get_rng_state(), state)

    def test_greedy_text_varies(self, arch: Arch):
        tokens = peft_greedy(tiny_model(arch), PROMPT, 24)
        assert len(set(tokens)) >= LEAST_VARIETY.get(arch, 12)

    def test_biases_are_not_zero(self, arch: Arch):
        biases = [p for name, p in tiny_model(arch).named_parameters() if name.endswith("bias")]
        assert all(bias.abs().max() > 0.1 for bias in biases)
        assert len(biases) > 0 or arch in WITHOUT_BIASES

    def test_is_the_same_after_saving(self, arch: Arch, tmp_path: Path):
        model = tiny_model(arch)
        loaded = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path)).eval()
        assert torch.equal(peft_logits(loaded, PROMPT), peft_logits(model, PROMPT))


def test_overrides_go_by_common_and_own_names():
    assert tiny_model("gpt2", hidden_size=32).config.n_embd == 32
    assert tiny_model("gpt2", n_embd=32).config.n_embd == 32
    assert tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True).config.num_hidden_layers == 1


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "full"])
@pytest.mark.parametrize("arch", ARCHS)
def test_adapters_change_the_text_and_reload_exactly(arch: Arch, compact: bool, tmp_path: Path):
    model = tiny_model(arch)
    texts = [peft_greedy(model, PROMPT, 8)]
    for seed in (1, 2):
        spec = AdapterSpec(compact=compact, seed=seed)
        trained = trainable_adapter(model, spec)
        reloaded = peft_reference(model, make_adapter(model, spec, tmp_path / f"adapter-{seed}"))
        torch.testing.assert_close(peft_logits(reloaded, PROMPT), peft_logits(trained, PROMPT), rtol=0, atol=1e-4)
        texts.append(peft_greedy(reloaded, PROMPT, 8))
    assert len({tuple(text) for text in texts}) == 3


def test_the_given_model_is_not_touched(tmp_path: Path):
    model = tiny_model("llama")
    before = peft_logits(model, PROMPT)
    path = make_adapter(model, AdapterSpec(bias="all", modules_to_save=["lm_head"]), tmp_path)
    peft_reference(model, path)
    assert torch.equal(peft_logits(model, PROMPT), before)
    assert not any("vblora" in name for name, _ in model.named_parameters())


def test_the_same_spec_writes_the_same_bytes(tmp_path: Path):
    spec = AdapterSpec(target_modules=["v_proj", "q_proj", "o_proj"], seed=5)
    first = make_adapter(lambda: tiny_model("llama"), spec, tmp_path / "first")
    second = make_adapter(tiny_model("llama"), spec, tmp_path / "second")
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert {file.name for file in first.iterdir()} == {WEIGHTS_FILE, CONFIG_FILE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "full"])
def test_16_bit_adapters_are_stored_in_16_bits_and_widen_exactly(dtype: torch.dtype, compact: bool, tmp_path: Path):
    model = tiny_model("qwen2")
    spec = AdapterSpec(dtype=dtype, compact=compact, bias="vblora_only", modules_to_save=["lm_head"])
    narrow = make_adapter(model, spec, tmp_path / "narrow")
    wide = widen_adapter(narrow, tmp_path / "wide")
    stored, widened = load_file(narrow / WEIGHTS_FILE), load_file(wide / WEIGHTS_FILE)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
    assert {t.dtype for t in widened.values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.equal(stored[name].float(), widened[name].float()) for name in stored)
    assert peft_logits(peft_reference(model, wide), PROMPT).isfinite().all()


def test_biases_and_saved_modules_are_trained_and_stored(tmp_path: Path):
    model = tiny_model("gpt2")
    spec = AdapterSpec(bias="all", modules_to_save=["lm_head"])
    stored = load_file(make_adapter(model, spec, tmp_path) / WEIGHTS_FILE)
    base = model.state_dict()
    for key, name in {
        "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias": "transformer.h.0.attn.c_attn.bias",
        "base_model.model.transformer.h.1.ln_1.bias": "transformer.h.1.ln_1.bias",
        "base_model.model.lm_head.weight": "lm_head.weight",
    }.items():
        assert (stored[key] - base[name]).abs().max() > 0.1


def test_embeddings_are_stored_when_asked_for(tmp_path: Path):
    spec = AdapterSpec(save_embedding_layers=True)
    stored = load_file(make_adapter(tiny_model("llama"), spec, tmp_path) / WEIGHTS_FILE)
    assert "base_model.model.model.embed_tokens.weight" in stored
    assert "base_model.model.lm_head.weight" in stored


def test_rewrite_changes_a_copy(tmp_path: Path):
    source = make_adapter(tiny_model("llama"), AdapterSpec(), tmp_path / "source")
    bank = "base_model.vblora_vector_bank"
    gone = next(name for name in load_file(source / WEIGHTS_FILE) if name.endswith("_topk_weights"))

    merged = rewrite(source, tmp_path / "merged", {gone: None, bank: torch.zeros(2, 16)}, {"revision": "x"})
    edited = rewrite(source, tmp_path / "edited", lambda t: t.pop(gone), lambda c: c.pop("topk"))

    assert gone not in load_file(merged / WEIGHTS_FILE)
    assert gone not in load_file(edited / WEIGHTS_FILE)
    assert gone in load_file(source / WEIGHTS_FILE)
    assert load_file(merged / WEIGHTS_FILE)[bank].shape == (2, 16)
    assert json.loads((merged / CONFIG_FILE).read_text())["revision"] == "x"
    assert "topk" not in json.loads((edited / CONFIG_FILE).read_text())


@pytest.mark.parametrize("fixture", recorded_fixtures(), ids=lambda fixture: fixture.name)
def test_todays_peft_computes_what_was_recorded(fixture: Fixture, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(fixture.base).eval()
    model = peft_reference(base, widen_adapter(fixture.adapter, tmp_path))
    logits = peft_logits(model, fixture.expected["prompt"])
    torch.testing.assert_close(logits[None], fixture.token_logits(), rtol=0, atol=1e-3)


def test_both_releases_recorded_the_same_fixtures():
    names = {release: set() for release in ("peft-0.13", "peft-0.21")}
    for fixture in recorded_fixtures():
        names[fixture.path.parent.name].add(fixture.path.name)
    assert names["peft-0.13"] == names["peft-0.21"] != set()
