"""Toy models: any causal architecture of transformers, small enough to be tried in seconds, with random weights.

No architecture has a recipe of its own: whatever its configuration has of the usual sizes is set to a small one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvmix_compile.models_zoo.seeding import seeded

VOCABULARY = 128
MAX_POSITIONS = 512
LAYERS = 2
WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 16, 96
# Beyond the recent tokens of the trial's plans, so that layers with a window read from storage too.
WINDOW = 64
EXPERTS, ACTIVE_EXPERTS = 4, 2

# More parameters than this are no toy: some size is not among those below.
MOST_PARAMETERS = 20_000_000

LONGEST_REASON = 200

GAIN, BIAS_RANGE = 1.5, 0.1

LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "num_decoder_layers", "num_encoder_layers",
    "decoder_layers", "encoder_layers", "depth",
)  # fmt: skip
# The usual names of sizes. A size is set where a configuration has it as a number; what it leaves open follows.
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(LAYER_COUNTS, LAYERS),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "dim_model", "embedding_size", "embedding_dim",
         "input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "lru_width",
         "backbone_hidden_size"), WIDTH
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
         "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"), HEADS
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups",
         "linear_num_key_heads", "num_global_key_value_heads"), KV_HEADS
    ),
    **dict.fromkeys(
        ("head_dim", "dim_head", "d_head", "attention_head_size", "attention_head_dim", "kv_channels", "swa_head_dim",
         "global_head_dim", "v_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "linear_head_dim", "index_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim",
         "query_pre_attn_scalar"), HEAD_DIM
    ),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_DIM // 2),
    "qk_head_dim": HEAD_DIM + HEAD_DIM // 2,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 2 * HEAD_DIM),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dim_ff", "dff",
         "d_inner", "feed_forward_size", "moe_intermediate_size", "shared_intermediate_size",
         "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp",
         "expert_ffn_hidden_size", "dense_intermediate_size", "block_ff_dim"), INNER
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
        ACTIVE_EXPERTS,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size",
                     "local_attention", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "max_seq_len", "context_length",
         "max_target_positions", "original_max_position_embeddings"), MAX_POSITIONS
    ),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), HEAD_DIM),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 2 * WIDTH // HEAD_DIM),
    "hidden_size_per_layer_input": HEAD_DIM,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FLAGS: Mapping[str, bool] = {"is_decoder": True, "add_cross_attention": False}

# Where a configuration lists what each of its layers is.
KINDS = frozenset({"layer_types", "layers_block_type"})
# Set also where it is None by default, from which not every model finds its own.
OFTEN_LEFT_OPEN = ("head_dim", "num_key_value_heads")

# Their sizes depend on each other in ways that no rule above knows.
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": ACTIVE_EXPERTS},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": ACTIVE_EXPERTS},
    "dots3_note_text": {"per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": HEAD_DIM // 2},
    "mamba2": {"num_heads": 2 * WIDTH // HEAD_DIM},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_DIM,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_DIM},
    "zaya": {"num_experts_per_tok": 1},
}


class NoToyError(Exception):
    """The architecture cannot be made at toy size from its configuration alone."""


def architectures() -> list[str]:
    """The model types that transformers maps to a causal language model, sorted."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def toy_config(model_type: str) -> PreTrainedConfig:
    """The smallest configuration of this type in which every kind of its layers occurs."""
    kind = next(config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.model_type == model_type)
    return _small(kind)


def toy_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation mode. Raises NoToyError where it cannot be made, or only a large one."""
    try:
        config = toy_config(model_type)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        raise NoToyError(f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}") from error
    if size > MOST_PARAMETERS:
        raise NoToyError(f"it has {size / 1e6:.0f} million parameters at least")
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(model)
    return model.eval()


def _small(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = kind()
    nested = {name: getattr(default, name) for name in kind.sub_configs if getattr(default, name, None) is not None}
    settings = _sizes(default) | {name: _small(type(config)) for name, config in nested.items()}
    for name in KINDS & default.to_dict().keys():
        if kinds := _one_of_each(getattr(default, name, None)):
            settings |= {name: kinds} | {count: len(kinds) for count in LAYER_COUNTS if count in settings}
    return kind(**settings | EXCEPTIONS.get(kind.model_type, {}))


def _sizes(default: PreTrainedConfig) -> dict[str, Any]:
    """The new sizes of what a default configuration has as a number, or as a flag."""
    given = default.to_dict()
    sizes = {name: size for name, size in (SIZES | FLAGS).items() if type(given.get(name)) is type(size)}
    sizes |= {name: SIZES[name] for name in OFTEN_LEFT_OPEN if name in given}
    if "qk_rope_head_dim" in sizes:  # multi-head latent attention: every query head has keys of its own
        sizes.pop("head_dim", None)
        sizes |= {"num_key_value_heads": HEADS} if "num_key_value_heads" in sizes else {}
    return sizes


def _one_of_each(kinds: list[str] | None) -> list[str]:
    """Each kind of layer once, and as many layers as a toy has at least."""
    distinct = list(dict.fromkeys(kinds or []))
    return distinct * LAYERS if len(distinct) == 1 else distinct


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Give matrices weights that let attention be far from uniform, and biases some that would be missed.

    transformers' own are so small that random attention is nearly uniform.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, GAIN * parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(0.0, BIAS_RANGE)
