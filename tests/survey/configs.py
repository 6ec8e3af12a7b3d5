"""Tiny configurations of every text decoder that transformers has: the fields that are known, small."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.factories import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

WINDOW = 16  # longer than the self-test's texts, and shorter than some prompts: there only knowing of it helps

_SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
    # as older configurations call them
    "n_positions": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 128,
    "ffn_dim": 128,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_hidden_size": 128,
    "max_seq_len": 256,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # compressed keys and values
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    # recurrent layers
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "state_size": 8,
    "time_step_rank": 8,
    "lru_width": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Gemma's inputs per layer
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 0,
}

# With compressed keys and values, the features of a head that are turned by its position.
_COMPRESSED = {"head_dim": 8, "num_key_value_heads": 4}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": _COMPRESSED,
    "deepseek_v3": _COMPRESSED,
    "glm4_moe_lite": _COMPRESSED,
    "minicpm3": _COMPRESSED,
    "youtu": _COMPRESSED,
    "axk1": _COMPRESSED,
    "deepseek_v32": _COMPRESSED,
    "glm_moe_dsa": _COMPRESSED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron": {"norm_eps": 1e-5},
    "xglm": {"pad_token_id": 1},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "bailing_hybrid": {"num_key_value_heads": 4, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": WINDOW},
}

# What an architecture can be besides its default, where that changes positions, masks or caches.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama, dynamic NTK": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, YaRN": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "phi3, longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "starcoder2, no window": ("starcoder2", {"sliding_window": None}),
}

_NAMES = """
afmoe apertus arcee axk1 bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cpmant ctrl
cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4
exaone_moe falcon falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4
glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe
kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text mamba mamba2 mellum mimo_v2_flash minicpm3 minimax
minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2
olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text
qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm
starcoder2 vaultgemma xglm xlm xlnet xlstm youtu zaya
"""
ARCHITECTURES = tuple(_NAMES.split())


SURVEYED = tuple(sorted((*ARCHITECTURES, *VARIANTS)))


def tiny_config(name: str) -> PretrainedConfig:
    """An architecture's configuration, or a variant's, with each of the fields above that it has.

    A layer of each kind that it has by default, two at least.
    """
    model_type, variant = VARIANTS.get(name, (name, {}))
    made_by = CONFIG_MAPPING[model_type]
    own_names = made_by.attribute_map
    known = {*inspect.signature(made_by.__init__).parameters, *getattr(made_by, "__dataclass_fields__", {})}
    fields: dict[str, Any] = {}
    for name, value in _SMALL.items():
        own = own_names.get(name, name)
        if own in known:
            fields.setdefault(own, value)
    for name, value in _OWN.get(model_type, {}).items():
        fields[own_names.get(name, name)] = value
    fields |= variant
    kinds = list(dict.fromkeys(getattr(_default(made_by), "layer_types", None) or ()))
    if "layer_types" in known and "layer_types" not in fields and len(kinds) > 1:
        fields["layer_types"] = kinds
        fields[own_names.get("num_hidden_layers", "num_hidden_layers")] = len(kinds)
    return made_by(**fields)


def _default(made_by: type[PretrainedConfig]) -> PretrainedConfig | None:
    try:
        return made_by()
    except Exception:  # some cannot be made without fields
        return None
