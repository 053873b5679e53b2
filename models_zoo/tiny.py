"""Tiny random transformers models, one for each way of spelling attention: seconds to export, no download.

All are float32, in eval mode, with a vocabulary of 128 and 512 positions. Their weights are much larger than
transformers' default, so that attention is far from uniform and logits clearly depend on tokens far back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from kvmix_compile.models_zoo.seeding import seeded

Settings = Mapping[str, Any]

VOCABULARY = 128
MAX_POSITIONS = 512
WINDOW = 24  # tokens that a sliding-window layer sees

# transformers' default is 0.02, which leaves random attention nearly uniform; at a width of 128 this gives scores that
# spread by a few units.
INITIALIZER_RANGE = 0.15
BIAS_RANGE = 0.1  # transformers starts biases at zero, which would hide one that got lost

COMMON: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": INITIALIZER_RANGE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Settings = {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
ALTERNATING: Settings = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

DECODERS: Mapping[str, Settings] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "qwen2": {"intermediate_size": 256, "num_key_value_heads": 2},
    "qwen3": GROUPED,
    # Only eager attention applies the cap on scores; it is low enough to be felt.
    "gemma2": {
        **GROUPED,
        **ALTERNATING,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 4.0,
        "attn_implementation": "eager",
    },
    "gemma3": {**GROUPED, **ALTERNATING, "query_pre_attn_scalar": 32},
    "phi3": {
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": MAX_POSITIONS,
    },
    "gpt2": {},
    "opt": {
        "num_attention_heads": 8,
        "ffn_dim": 256,
        "word_embed_proj_dim": 128,
        "init_std": INITIALIZER_RANGE,
    },
    "gpt_neox": {"intermediate_size": 256},
    "falcon": {"multi_query": True, "ffn_hidden_size": 256},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Decoders whose attention is more than causal, with a window or a soft cap.
SPECIAL: Mapping[str, Settings] = {
    # Chunks in three of four layers, and a temperature by position in the fourth, here felt from token 16 on.
    "llama4": {
        **GROUPED,
        "intermediate_size_mlp": 256,
        "num_hidden_layers": 4,
        "num_local_experts": 2,
        "attention_chunk_size": WINDOW,
        "floor_scale": 16,
        "attn_scale": 0.5,
    },
    # Sink logits.
    "gpt_oss": {
        **GROUPED,
        **ALTERNATING,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # ALiBi: within the product of queries and keys, added to scores, and as the mask of fused attention.
    "bloom": {},
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_POSITIONS},
    "falcon_alibi": {"alibi": True, "ffn_hidden_size": 256, "bias": True},
}
# Keys and values of all heads are made of one narrow row a token, which is what transformers caches.
LATENT: Mapping[str, Settings] = {
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "first_k_dense_replace": 2,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
}
# Attention in some layers, and in the rest a recurrence or a convolution.
HYBRID: Mapping[str, Settings] = {
    "lfm2": {"intermediate_size": 256, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **GROUPED,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "bamba": {
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_chunk_size": 32,
    },
}
# What a compiler of causal attention has to decline, or to take special care of.
OTHERS: Mapping[str, Settings] = {
    "bert": {"intermediate_size": 256},
    "t5": {"d_kv": 32, "d_ff": 256, "num_decoder_layers": 2},
    "mamba": {},
}
# Where transformers registers the decoder under another name.
MODEL_TYPES = {"gemma3": "gemma3_text", "llama4": "llama4_text", "falcon_alibi": "falcon"}
AUTO_CLASSES = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}

RECIPES: Mapping[str, Settings] = {**DECODERS, **SPECIAL, **LATENT, **HYBRID, **OTHERS}

TINY: tuple[str, ...] = tuple(DECODERS)
TINY_SPECIAL: tuple[str, ...] = tuple(SPECIAL)
TINY_LATENT: tuple[str, ...] = tuple(LATENT)
TINY_HYBRID: tuple[str, ...] = tuple(HYBRID)
TINY_OTHERS: tuple[str, ...] = tuple(OTHERS)


def tiny(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of the architecture `name`, one of TINY (causal decoders), TINY_SPECIAL, TINY_LATENT,
    TINY_HYBRID or TINY_OTHERS.

    `overrides` are settings of its transformers config, `attn_implementation` included. The same arguments give the
    same weights, and the global random state stays as it is. Raises KeyError for an unknown name.
    """
    settings = {**COMMON, **RECIPES[name], **overrides}
    config = AutoConfig.for_model(MODEL_TYPES.get(name, name), **settings)
    with seeded(seed):
        model = AUTO_CLASSES.get(name, AutoModelForCausalLM).from_config(config, dtype=torch.float32)
        _randomize(model)
    return model.eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """What would not be felt as transformers initialises it: biases and sink logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, BIAS_RANGE)
        elif name.endswith("sinks"):
            parameter.normal_(0.0, 1.0)
