"""What a server is asked for: `--additional-config '{"kvmix": {"plan": "plan.json"}}'`, read and checked before
anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from kvmix_compile.errors import KVMixError, PlanError
from kvmix_compile.passes.allocate.plan import Plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Of vLLM, whose inner parts a plugin meets: what was tried, no other.
RELEASES = ("0.32.",)

NAME = "kvmix"
_OPTIONS = ("plan", "exact_chunks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ServingError(KVMixError):
    """A model, or an option of vLLM's, that cannot be served with a plan."""


@dataclass(frozen=True)
class Settings:
    """plan: of the whole model, on all ranks.
    exact_chunks: whether what a token reads depends neither on how vLLM cuts prompts nor on what it has cached.
    """

    plan: Plan
    exact_chunks: bool


def asked_for(config: VllmConfig) -> Settings | None:
    """What a server is asked for; None where it is to be as it is without this plugin.

    Raises ServingError for what cannot be understood, and PlanError for a plan that cannot be read.
    """
    options = config.additional_config.get(NAME) if isinstance(config.additional_config, dict) else None
    if options is None:
        return None
    if not isinstance(options, dict) or "plan" not in options or set(options) - set(_OPTIONS):
        raise ServingError(f'"{NAME}" in --additional-config is {{"plan": "plan.json"}}, not {options!r}')
    exact_chunks = options.get("exact_chunks", True)
    if not isinstance(exact_chunks, bool):
        raise ServingError(f'"exact_chunks" of "{NAME}" in --additional-config is true or false, not {exact_chunks!r}')
    return Settings(_plan(options["plan"]), exact_chunks)


@lru_cache(maxsize=1)
def _plan(path: str) -> Plan:
    return Plan.load(path)


def check(config: VllmConfig, settings: Settings, release: str) -> None:
    """Raises ServingError, in a sentence, where this release, these options or this kind of model cannot be served, and
    PlanError where the plan is for another model, as far as its config tells.
    """
    if not release.startswith(RELEASES):
        tried = " and ".join(f"{series}x" for series in RELEASES)
        raise ServingError(f"kvmix serves in vLLM {tried}, and this is {release}: install one of those")
    for is_wrong, what, instead in _refusals(config):
        if is_wrong:
            raise ServingError(f"kvmix cannot serve {what}: {instead}")
    _check_shapes(config, settings.plan)


def _refusals(config: VllmConfig) -> list[tuple[bool, str, str]]:
    """Whether something is the case that is refused, what it is, and what to do."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    heads, ranks = model.get_total_num_kv_heads(), parallel.tensor_parallel_size
    return [
        (
            cache.cache_dtype != "auto",
            f"--kv-cache-dtype {cache.cache_dtype}",
            "leave it out, the plan says how to store",
        ),
        (model.dtype not in _DTYPES, f"a model of {model.dtype}", "choose --dtype float32, bfloat16 or float16"),
        (model.is_attention_free, "a model without attention", "serve it without a plan"),
        (model.is_hybrid, "a model that mixes tokens otherwise than by attention", "serve it without a plan"),
        (model.is_encoder_decoder, "an encoder-decoder", "serve it without a plan"),
        (model.is_mm_prefix_lm, "images whose tokens see each other", "serve it without a plan"),
        (model.rswa_window is not None, "a window that begins with the answer", "serve it without a plan"),
        (model.use_mla, "multi-head latent attention", "serve it without a plan"),
        (config.speculative_config is not None, "speculative decoding", "leave --speculative-config out"),
        (config.kv_transfer_config is not None, "a KV connector", "leave --kv-transfer-config and offloading out"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism", "leave it out"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "leave it out"),
        (parallel.use_ubatching, "micro-batches that overlap", "leave --enable-dbo out"),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill", "leave it out"),
        (
            bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
            "--disable-hybrid-kv-cache-manager",
            "leave it out, packed blocks and unquantized tokens are groups of their own",
        ),
        (
            heads % ranks != 0,
            f"{heads} heads of keys and values on {ranks} ranks",
            "choose a --tensor-parallel-size that divides them",
        ),
    ]


def _check_shapes(config: VllmConfig, plan: Plan) -> None:
    """As far as a model's config tells: heads and layers may differ from one another there. Each layer is compared
    again when it is made.
    """
    model = config.model_config
    layers, heads, size = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    if len(plan.sites) > layers or not any((site.kv_heads, site.key_dim) == (heads, size) for site in plan.sites):
        first = plan.sites[0]
        raise PlanError(
            f"this plan was made for another model: it has {len(plan.sites)} layers, the first with {first.kv_heads} "
            f"heads of {first.key_dim} channels, and {model.model} has {layers}, with {heads} of {size}. Make a new "
            "plan for this model"
        )
