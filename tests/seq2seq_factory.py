"""Tiny encoder-decoders with random weights, and the adapters PEFT writes for them.

model = tiny_seq2seq("t5")
adapter = make_seq2seq_adapter(model, Seq2SeqSpec(seed=1), tmp_path / "adapter")
expected = peft_generated(model, adapter, [5, 6, 7], 12)
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, TaskType, VBLoRAConfig, get_peft_model
from peft.tuners.vblora import VBLoRALayer
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    PegasusConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from tests.factories import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, byte_tokenizer, generator_of, randomize, untouched_rng

Seq2SeqArch = Literal["t5", "t5-gated", "bart", "mbart", "pegasus", "marian", "m2m_100"]
SEQ2SEQ_ARCHS: list[Seq2SeqArch] = ["t5", "t5-gated", "bart"]
MORE_ARCHS: list[Seq2SeqArch] = ["mbart", "pegasus", "marian", "m2m_100"]
CONTEXT = 96
_OF_T5 = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
_OF_BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}
_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "bart": BartConfig,
    "mbart": MBartConfig,
    "pegasus": PegasusConfig,
    "marian": MarianConfig,
    "m2m_100": M2M100Config,
}


def seq2seq_config(arch: Seq2SeqArch, **overrides: Any) -> PretrainedConfig:
    """Two layers each side, four heads, hidden size 32."""
    if arch.startswith("t5"):
        own = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if arch == "t5-gated" else {}
        return T5Config(**{**_TOKENS, **own, **gated, "decoder_start_token_id": PAD_ID, **overrides})
    own = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS_ID,
        "decoder_start_token_id": EOS_ID,
        "forced_eos_token_id": None,
        "scale_embedding": False,
    }
    if arch == "m2m_100":
        own["pad_token_id"] = 1  # the place of the padding in its table of positions
    return _CONFIGS[arch](**{**_TOKENS, **own, **overrides})


def tiny_seq2seq(arch: Seq2SeqArch, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Float32, in eval mode."""
    with untouched_rng():
        model = AutoModelForSeq2SeqLM.from_config(seq2seq_config(arch, **overrides), dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the end of the text behind them, as encoders are used to."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS_ID)]
    )
    return tokenizer


def save_seq2seq(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    ending_tokenizer().save_pretrained(path)
    return path


@dataclass(frozen=True)
class Seq2SeqSpec:
    compact: bool = True
    seed: int = 0
    r: int = 3
    bias: Literal["none", "all", "vblora_only"] = "none"
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()


def make_seq2seq_adapter(model: PreTrainedModel, spec: Seq2SeqSpec, path: Path) -> Path:
    """Written by PEFT, as after training: self- and cross-attention and feed-forward layers of both sides."""
    usual = _OF_T5 if model.config.model_type == "t5" else _OF_BART
    config = VBLoRAConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        target_modules=list(spec.target_modules or usual),
        r=spec.r,
        num_vectors=24,
        vector_length=16,
        topk=2,
        save_only_topk_weights=spec.compact,
        bias=spec.bias,
        modules_to_save=list(spec.modules_to_save) or None,
    )
    base = copy.deepcopy(model)
    base.name_or_path = ""
    with untouched_rng():
        peft_model = get_peft_model(base, config)
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        generator = generator_of(spec.seed, name)
        if "vblora_vector_bank" in name:
            parameter.data.uniform_(-0.6, 0.6, generator=generator)
        elif "vblora_logits" in name:
            parameter.data.normal_(0, 1, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    shutil.rmtree(path, ignore_errors=True)
    peft_model.eval().save_pretrained(str(path))
    (path / "README.md").unlink(missing_ok=True)
    return path


def peft_loaded(model: PreTrainedModel, adapter: Path | None) -> Any:
    if adapter is None:
        return model
    with untouched_rng():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval()


@torch.inference_mode()
def peft_generated(loaded: Any, prompt: Sequence[int], tokens: int, **options: Any) -> list[int]:
    """`generate(do_sample=False)` of one prompt alone: what follows the decoder's start, the end included."""
    written = loaded.generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=1,
        max_new_tokens=tokens,
        **options,
    )
    ids: list[int] = written[0, 1:].tolist()
    return ids


def blended(model: PreTrainedModel, weights: Mapping[Path, float]) -> PreTrainedModel:
    """The base with PEFT's own dense deltas added to its weights."""
    summed = copy.deepcopy(model)
    for path, weight in weights.items():
        for name, module in peft_loaded(model, path).base_model.model.named_modules():
            if isinstance(module, VBLoRALayer):
                with torch.no_grad():
                    summed.get_submodule(name).weight += weight * module.get_delta_weight("default")
    return summed


@cache
def shared_model(arch: Seq2SeqArch) -> PreTrainedModel:
    """One that nobody changes."""
    return tiny_seq2seq(arch)
