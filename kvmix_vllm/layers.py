"""Layers: what vLLM's attention layers become when they are served with a plan.

A layer has two tables, of packed and of unquantized pages, and vLLM makes one for each layer that it knows. So a layer
of which anything is packed gets a second one, `RawPages`, which computes nothing. Where nothing is, unquantized pages
are all that there is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from kvmix_compile.passes.allocate.plan import Plan
from kvmix_vllm.backend import RAW, PagedAttention, PagedBackend
from kvmix_vllm.pages import Paging, is_packed, paging
from kvmix_vllm.settings import ServingError, Settings
from kvmix_vllm.sites import ServedSite, site_of
from kvmix_vllm.specs import PackedSpec, PackedWindowSpec, RawSpec


class RawPages(AttentionLayerBase):
    """The unquantized pages of a layer that has packed ones, too."""

    def __init__(self, spec: RawSpec) -> None:
        self._spec = spec

    def get_attn_backend(self) -> type[AttentionBackend]:
        """As of vLLM's layers."""
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RawSpec:
        """As of vLLM's layers."""
        return self._spec


def serve(layer: Attention, config: VllmConfig, settings: Settings) -> None:
    """Gives a layer, just made for PagedBackend, its part of the plan, and a second layer beside it.

    Raises PlanError or ServingError where that is not possible.
    """
    _check(layer)
    ranks = config.parallel_config.tensor_parallel_size
    site = site_of(layer, settings.plan, get_tensor_model_parallel_rank(), ranks)
    layer.impl.serve(site, settings.exact_chunks)
    dtype = config.model_config.dtype
    own, raw = specs_of(site, _paging(settings.plan, ranks, dtype), dtype)
    layer.get_kv_cache_spec = lambda config: own
    if raw is not None:
        config.compilation_config.static_forward_context[layer.layer_name + RAW] = RawPages(raw)


def _check(layer: Attention) -> None:
    """Raises ServingError for a layer that does more than append a row's tokens and attend to them."""
    own = None
    if not isinstance(layer.impl, PagedAttention):
        own = f"attends by {type(layer.impl).__name__}"
    elif type(layer).get_kv_cache_spec is not Attention.get_kv_cache_spec:
        own = f"has the cache of a {type(layer).__name__}"
    elif layer.kv_cache_dtype != "auto":
        own = f"has a cache in {layer.kv_cache_dtype} by its checkpoint"
    if own is not None:
        raise ServingError(f"kvmix cannot serve {layer.layer_name}, which {own}: serve the model without a plan")


def specs_of(site: ServedSite, pages: Paging, dtype: torch.dtype) -> tuple[AttentionSpec, RawSpec | None]:
    """What vLLM is told of a layer, and of its second one, if it has one."""
    layout = site.stored.layout
    raw = RawSpec.of(layout, pages, dtype)
    if not is_packed(layout):
        return raw, None
    return (PackedWindowSpec if layout.window else PackedSpec).of(layout, pages.packed[site.name]), raw


@lru_cache(maxsize=1)
def _paging(plan: Plan, ranks: int, dtype: torch.dtype) -> Paging:
    """The same on every rank."""
    own = plan.of_heads(0, ranks)
    return paging({site.layer: layout for site, layout in zip(own.sites, own.layouts(), strict=True)}, dtype)
