"""Small random models of many architectures."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


def sizes(text: str) -> dict[str, Any]:
    """`n_layer=2 n_head=4` as a dictionary."""
    return {name: int(size) for name, _, size in (part.partition("=") for part in text.split())}


SHAPE = sizes(
    "hidden_size=64 intermediate_size=128 num_hidden_layers=2 num_attention_heads=4 "
    "num_key_value_heads=2 vocab_size=384 pad_token_id=0 bos_token_id=1 eos_token_id=2"
) | {"initializer_range": 0.2}
WINDOW = {"sliding_window": 16, "use_sliding_window": True}  # shorter than two conversations
GPT2 = sizes("n_embd=64 n_layer=2 n_head=4")
EXPERTS = sizes("num_experts=4 num_local_experts=4 num_experts_per_tok=2")
HEAD = {"head_dim": 16}
MAMBA = sizes("mamba_n_heads=4 mamba_d_head=32 mamba_d_state=8") | {"use_mamba_kernels": False}
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Settings of an architecture beyond `SHAPE`.
BESIDES: dict[str, dict[str, Any]] = {
    "cohere2": WINDOW,
    "ernie4_5": HEAD,
    "exaone4": WINDOW,
    "gemma": HEAD,
    "gemma3_text": WINDOW | HEAD | {"query_pre_attn_scalar": 16},
    "glm": HEAD,
    "glm4": HEAD,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "hunyuan_v1_dense": HEAD,
    "mistral": WINDOW,
    "mixtral": WINDOW | EXPERTS,
    "olmo3": WINDOW,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": WINDOW,
    "qwen2": WINDOW | {"max_window_layers": 1},
    "qwen2_moe": EXPERTS | sizes("moe_intermediate_size=32 shared_expert_intermediate_size=32"),
    "qwen3": WINDOW | HEAD | {"max_window_layers": 1},
    "qwen3_moe": EXPERTS | HEAD | {"moe_intermediate_size": 32},
    "seed_oss": HEAD,
}
# Mixtures of experts that are in neither `BESIDES` nor `OTHERS`.
MOE = EXPERTS | HEAD | sizes("moe_intermediate_size=32 n_routed_experts=4 n_shared_experts=1")
MOE |= sizes("n_group=1 topk_group=1 first_k_dense_replace=1")
FULL = {"layer_types": ["full_attention"] * 2}
PLAIN_MIXTURES = "dots1 flex_olmo granitemoe glm4_moe minimax minimax_m2 olmoe solar_open"
MIXTURES: dict[str, dict[str, Any]] = dict.fromkeys(PLAIN_MIXTURES.split(), MOE) | {
    "ernie4_5_moe": MOE | {"moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": MOE | FULL | {"mlp_layer_types": ["dense", "sparse"]},
    "granitemoeshared": MOE | {"shared_intermediate_size": 32},
    "qwen3_5_moe_text": MOE | FULL | {"shared_expert_intermediate_size": 32},
    "lfm2_moe": MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}
# Attention without a torch kernel, own masks, recurrent states: conversations cannot share a row.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": WINDOW | HEAD | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gpt_oss": WINDOW | HEAD | EXPERTS,
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": False},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": GPT2 | {"rotary_dim": 8},
    "llama4_text": HEAD | EXPERTS | {"intermediate_size_mlp": 128, "attention_chunk_size": 16},
    "deepseek_v3": sizes(
        "num_key_value_heads=4 kv_lora_rank=16 q_lora_rank=16 qk_nope_head_dim=8 v_head_dim=8 "
        "qk_rope_head_dim=8 n_routed_experts=4 num_experts_per_tok=2 n_group=2 topk_group=1 "
        "moe_intermediate_size=32 first_k_dense_replace=1"
    ),
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": sizes("num_heads=8 head_dim=16 state_size=8 n_groups=1"),
    "qwen3_next": EXPERTS
    | HEAD
    | {"layer_types": ["linear_attention", "full_attention"]}
    | sizes("linear_key_head_dim=16 linear_value_head_dim=16 linear_num_key_heads=2")
    | sizes("linear_num_value_heads=2 moe_intermediate_size=32 shared_expert_intermediate_size=32"),
    "phi3": {
        "rope_parameters": SCALED
        | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    },
    "llama": {"rope_parameters": SCALED | {"rope_type": "dynamic"}, "max_position_embeddings": 16},
}


def random(kind: str, besides: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SHAPE | besides)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def saved(folder: Path, kind: str, besides: dict[str, Any]) -> Path:
    random(kind, besides).save_pretrained(folder)
    return folder


MIXTURES |= {kind: BESIDES[kind] for kind in ("mixtral", "qwen2_moe", "qwen3_moe")}
MIXTURES |= {k: OTHERS[k] for k in ("deepseek_v3", "gpt_oss", "granitemoehybrid", "qwen3_next")}
MIXTURES["deepseek_v2"] = OTHERS["deepseek_v3"] | {"num_experts": 4, "head_dim": 8}
MIXTURES["glm4_moe_lite"] = OTHERS["deepseek_v3"] | MOE
