"""Tiny classifiers and encoders with random weights, tokenizers that take pairs, and the adapters PEFT writes for them.

model = tiny_classifier("roberta")
adapter = make_classifier_adapter(model, HeadSpec(labels=3, seed=1), tmp_path / "adapter")
expected = peft_scores(model, adapter, [[5, 6, 7]])
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, TaskType, VBLoRAConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

from tests.factories import generator_of, randomize, untouched_rng

PoolArch = Literal["bert", "roberta", "llama", "qwen2"]
POOL_ARCHS: list[PoolArch] = ["bert", "roberta", "llama", "qwen2"]
PAD, CLS, SEP, UNKNOWN = 1, 0, 2, 3
_SPECIAL = {"<s>": CLS, "<pad>": PAD, "</s>": SEP, "<unk>": UNKNOWN}
VOCABULARY = 132
CONTEXT = 64
_TARGETS = {"bert": ["query", "value", "intermediate.dense"], "roberta": ["query", "value", "intermediate.dense"]}
_OF_DECODERS = ["q_proj", "v_proj", "down_proj"]


def word_tokenizer(arch: PoolArch) -> PreTrainedTokenizerFast:
    """One token for each character of ASCII; pairs as each architecture writes them."""
    vocabulary = {**_SPECIAL, **{chr(code): code + 4 for code in range(128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    specials = [(name, _SPECIAL[name]) for name in ("<s>", "</s>")]
    single, pair = {
        "bert": ("<s> $A </s>", "<s>:0 $A:0 </s>:0 $B:1 </s>:1"),
        "roberta": ("<s> $A </s>", "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0"),
    }.get(arch, ("<s> $A", "<s>:0 $A:0 </s>:0 $B:0"))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if arch == "bert" else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=names,
        model_max_length=CONTEXT,
    )


def pool_config(arch: PoolArch, **overrides: Any) -> PretrainedConfig:
    """Two layers, four heads, hidden size 32."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT + PAD + 1 if arch == "roberta" else CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
    }
    if arch == "bert":
        return BertConfig(**{**common, **overrides})
    if arch == "roberta":
        return RobertaConfig(**{**common, "type_vocab_size": 1, **overrides})
    kind = LlamaConfig if arch == "llama" else Qwen2Config
    return kind(**{**common, "num_key_value_heads": 2, **overrides})


def tiny_classifier(arch: PoolArch, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A classifier of two labels, float32, in eval mode."""
    return _tiny(AutoModelForSequenceClassification, arch, seed, overrides)


def tiny_encoder(arch: PoolArch, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The model without any head."""
    return _tiny(AutoModel, arch, seed, overrides)


def _tiny(kind: Any, arch: PoolArch, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    with untouched_rng():
        model = kind.from_config(pool_config(arch, **overrides), dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def save_pool_model(model: PreTrainedModel, arch: PoolArch, path: Path) -> Path:
    model.save_pretrained(path)
    word_tokenizer(arch).save_pretrained(path)
    return path


@dataclass(frozen=True)
class HeadSpec:
    """An adapter of a classifier; `labels` None: of an encoder, without a head."""

    labels: int | None = 2
    compact: bool = True
    seed: int = 0
    modules_to_save: tuple[str, ...] = ()
    r: int = 3


def make_pool_adapter(model: PreTrainedModel, spec: HeadSpec, path: Path) -> Path:
    """Written by PEFT, as after training, on a copy of the model that has `spec.labels` labels."""
    arch = model.config.model_type
    base = with_labels(model, spec.labels, spec.seed)
    base.name_or_path = ""
    config = VBLoRAConfig(
        task_type=TaskType.FEATURE_EXTRACTION if spec.labels is None else TaskType.SEQ_CLS,
        target_modules=_TARGETS.get(arch, _OF_DECODERS),
        r=spec.r,
        num_vectors=24,
        vector_length=16,
        topk=2,
        save_only_topk_weights=spec.compact,
        modules_to_save=list(spec.modules_to_save) or None,
    )
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
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    peft_model.eval().save_pretrained(str(path))
    (path / "README.md").unlink(missing_ok=True)
    return path


def with_labels(model: PreTrainedModel, labels: int | None, seed: int = 0) -> PreTrainedModel:
    """A copy of a classifier whose head is for another number of labels, drawn anew where it is."""
    if labels is None or labels == model.config.num_labels:
        return copy.deepcopy(model)
    config = copy.deepcopy(model.config)
    config.num_labels = labels
    with untouched_rng():
        other = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    randomize(other, seed + 1000)
    own = other.state_dict()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if v.shape == own[k].shape}, strict=False)
    return other.eval()


def peft_loaded(model: PreTrainedModel, adapter: Path, labels: int | None) -> PeftModel:
    with untouched_rng():
        return PeftModel.from_pretrained(with_labels(model, labels), str(adapter)).eval()


@torch.inference_mode()
def peft_scores(model: PreTrainedModel, adapter: Path | None, labels: int, ids: Sequence[int], **more: Any) -> Tensor:
    """PEFT's logits [labels] for one text alone."""
    loaded = model if adapter is None else peft_loaded(model, adapter, labels)
    logits: Tensor = loaded(input_ids=torch.tensor([list(ids)]), **more).logits[0]
    return logits
