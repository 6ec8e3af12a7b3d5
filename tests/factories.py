"""Tiny base models with random weights, and VB-LoRA adapters written by PEFT itself.

Everything is seeded, on the CPU and without a network. The values are strong on purpose: a model's greedy
text varies, and an adapter changes it, so that an adapter that is lost, or given to the wrong row, shows up
as a wrong token and not as noise in the fifth digit.

    model = tiny_model("llama")
    adapter = make_adapter(model, AdapterSpec(topk=3, seed=1), tmp_path / "adapter")
    expected = peft_greedy(peft_reference(model, adapter), prompt, 16)
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)  # on models this small a second thread only costs: five times the time on a busy machine

Arch = Literal["llama", "qwen2", "qwen3", "gemma2", "gpt2", "opt"]
ModelSource = PreTrainedModel | Callable[[], PreTrainedModel]
Change = Callable[[dict[str, Any]], object] | Mapping[str, Any]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 272  # 256 bytes and three special tokens, rounded up so that lm_head can be cut into tiles of 16

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# --- tokenizer ------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: a token's id is the value of its byte, so any text round-trips."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers (GPT-2's table), in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


# --- base models ----------------------------------------------------------------------------------


def tiny_model(arch: Arch, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in eval mode; `overrides` are config fields by their common or their own names."""
    with untouched_rng():
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def tiny_config(arch: Arch, **overrides: Any) -> PretrainedConfig:
    """The config of `tiny_model`: two layers, four heads (two for keys and values), hidden size 64."""
    config_class, own = {
        "llama": (LlamaConfig, {"intermediate_size": 128, "num_key_value_heads": 2}),
        "qwen2": (Qwen2Config, {"intermediate_size": 128, "num_key_value_heads": 2}),
        "qwen3": (Qwen3Config, {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}),
        "gemma2": (
            Gemma2Config,
            {
                "intermediate_size": 128,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 8,
            },
        ),
        "gpt2": (GPT2Config, {"n_inner": 128}),
        "opt": (OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": overrides.get("hidden_size", 64)}),
    }[arch]
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    fields = {**common, **own, **overrides}
    own_name = config_class.attribute_map  # {"hidden_size": "n_embd", …} for gpt2
    return config_class(**{own_name.get(name, name): value for name, value in fields.items()})


def randomize(model: nn.Module, seed: int, std: float = 0.2) -> None:
    """Overwrite every parameter: norm scales around 1, all the rest, biases included, normal with `std`.

    Each parameter draws from its own seed and name: its values do not depend on the order in which a library
    creates modules, nor on how many layers there are.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator_of(seed, name)) * std
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.copy_(1 + noise if is_scale else noise)


def save_model(model: PreTrainedModel, path: Path) -> Path:
    """Write model and tokenizer as one directory for `AutoModelForCausalLM` and `AutoTokenizer`."""
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


# --- adapters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSpec:
    """What `make_adapter` writes. `target_modules=None` leaves the choice to PEFT's table."""

    r: int = 4
    num_vectors: int = 32
    vector_length: int = 16
    topk: int = 2
    compact: bool = True
    dtype: torch.dtype = torch.float32  # of the stored tensors
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none", "all", "vblora_only"] = "none"
    modules_to_save: list[str] | None = None
    save_embedding_layers: bool | Literal["auto"] = "auto"  # True: as after a resize of the vocabulary
    bank_bound: float = 0.6
    logits_std: float = 1.0
    seed: int = 0
    base_model_name_or_path: str | None = None

    def peft_config(self, *, fan_in_fan_out: bool = False) -> VBLoRAConfig:
        """A new config each time: PEFT writes into the one it is given."""
        optional: dict[str, Any] = {
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
            "layers_to_transform": self.layers_to_transform,
            "layers_pattern": self.layers_pattern,
            "modules_to_save": self.modules_to_save,
        }
        return VBLoRAConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            num_vectors=self.num_vectors,
            vector_length=self.vector_length,
            topk=self.topk,
            save_only_topk_weights=self.compact,
            bias=self.bias,
            fan_in_fan_out=fan_in_fan_out,
            **{name: value for name, value in optional.items() if value is not None},
        )


def make_adapter(model: ModelSource, spec: AdapterSpec, path: Path) -> Path:
    """Write the adapter that `spec` describes with PEFT's `save_pretrained`; the model stays as it is."""
    return save_adapter(trainable_adapter(model, spec), spec, path)


def trainable_adapter(model: ModelSource, spec: AdapterSpec) -> PeftModel:
    """A copy of the model with PEFT's adapter "as trained": strong random values in the dtype of `spec`.

    Ask this one for PEFT's parameter count: a reloaded adapter leaves out biases and saved modules.
    """
    base = copy.deepcopy(model) if isinstance(model, PreTrainedModel) else model()
    base.name_or_path = ""  # else PEFT writes the path into the config
    with untouched_rng():
        peft_model = get_peft_model(base, spec.peft_config(fan_in_fan_out=base.config.model_type == "gpt2"))
    _pretend_training(peft_model, spec)
    return peft_model.eval()


def _pretend_training(peft_model: PeftModel, spec: AdapterSpec) -> None:
    """Random values for all that trains. The cast comes last: PEFT keeps what it trains in float32."""
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        generator = generator_of(spec.seed, name)
        if "vblora_vector_bank" in name:
            parameter.data.uniform_(-spec.bank_bound, spec.bank_bound, generator=generator)
        elif "vblora_logits" in name:
            parameter.data.normal_(0, spec.logits_std, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        parameter.data = parameter.data.to(spec.dtype)


def save_adapter(peft_model: PeftModel, spec: AdapterSpec, path: Path) -> Path:
    """PEFT's `save_pretrained`, without its README, and with what varies in its config pinned."""
    peft_model.save_pretrained(str(path), save_embedding_layers=spec.save_embedding_layers)
    (path / "README.md").unlink()
    config = json.loads((path / CONFIG_FILE).read_text())
    config["base_model_name_or_path"] = spec.base_model_name_or_path
    for name in ("target_modules", "exclude_modules"):  # sets to PEFT: written in any order
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    _write_config(config, path)
    return path


def rewrite(
    source: Path,
    destination: Path,
    tensors: Change | None = None,
    config: Change | None = None,
) -> Path:
    """A changed copy of an adapter directory, for tests that damage checkpoints.

    A change is a function that edits the dict in place, or a mapping that is merged into it. A tensor of None
    is removed; a config value of None is JSON's null.
    """
    stored = load_file(source / WEIGHTS_FILE)
    _change(stored, tensors)
    settings = json.loads((source / CONFIG_FILE).read_text())
    _change(settings, config)
    destination.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None}
    save_file(kept, destination / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_config(settings, destination)
    return destination


def _change(values: dict[str, Any], change: Change | None) -> None:
    if callable(change):
        change(values)
    elif change is not None:
        values.update(change)


def _write_config(config: dict[str, Any], path: Path) -> None:
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))


def widen_adapter(source: Path, destination: Path) -> Path:
    """A copy with all float tensors in float32: PEFT cannot load compact checkpoints of 16 bits."""

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t.float() for name, t in tensors.items() if t.is_floating_point()})

    return rewrite(source, destination, tensors=widen)


# --- what PEFT makes of them ----------------------------------------------------------------------


def peft_reference(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A copy of the model with the adapter loaded by PEFT, in eval mode."""
    with untouched_rng():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval()


@torch.inference_mode()
def peft_logits(model: PeftModel | PreTrainedModel, prompt_ids: list[int]) -> Tensor:
    """Token logits `[len(prompt_ids), vocab]` of one unpadded forward pass."""
    return model(input_ids=torch.tensor([prompt_ids]), use_cache=False).logits[0]


def peft_greedy(model: PeftModel | PreTrainedModel, prompt_ids: list[int], n: int) -> list[int]:
    """The next `n` tokens by argmax: the whole text again at every step, no cache, no stop at EOS."""
    ids = list(prompt_ids)
    for _ in range(n):
        ids.append(int(peft_logits(model, ids)[-1].argmax()))
    return ids[len(prompt_ids) :]


# --- randomness -----------------------------------------------------------------------------------


def generator_of(seed: int, name: str) -> torch.Generator:
    """Independent of Python's hash seed and of the order of calls."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


@contextmanager
def untouched_rng() -> Iterator[None]:
    """The initial values that a library draws must not move the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        yield
