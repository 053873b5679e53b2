"""The attention backend: what vLLM calls for each layer, over pages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvmix_compile.kernels.ops import append_arguments
from kvmix_vllm.attention import attend, attend_exactly
from kvmix_vllm.pools import Pools
from kvmix_vllm.settings import ServingError
from kvmix_vllm.sites import Basis, ServedSite
from kvmix_vllm.tables import PackedTable, RawTable, TableBuilder

# What the name of a layer's unquantized pages has behind the layer's own.
RAW = ".raw"


class PagedBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """What vLLM calls any backend from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PagedAttention]:
        """As of vLLM's backends."""
        return PagedAttention

    @staticmethod
    def get_builder_cls() -> type[TableBuilder]:
        """As of vLLM's backends."""
        return TableBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """As of vLLM's backends."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """As of vLLM's backends."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block is one run of bytes, whichever group holds it, with the pages of its layers one behind the other."""
        return (KVCacheLayout.BLHNC,)


class PagedAttention(AttentionImpl[Any]):
    """One layer's attention: appends a step's tokens to its pages and attends to them."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        unknown = [name for name, given in others.items() if given is not None]
        if attn_type != AttentionType.DECODER or kv_sharing_target_layer_name or unknown:
            what = ", ".join(filter(None, (str(attn_type), kv_sharing_target_layer_name, *unknown)))
            raise ServingError(f"kvmix cannot serve attention of this kind ({what}): serve the model without a plan")
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads or num_heads
        self.kv_cache_dtype, self.scale, self.softcap = kv_cache_dtype, float(scale), float(logits_soft_cap or 0)
        self.sink_logits = sinks
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self._site: ServedSite | None = None
        self._exact_chunks = True
        self._basis: Basis | None = None
        # Of the pages that vLLM last gave the layer.
        self._pools: tuple[Tensor, Pools] | None = None

    def serve(self, site: ServedSite, exact_chunks: bool) -> None:
        """Told by the plan what to do."""
        self._site, self._exact_chunks = site, exact_chunks

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PackedTable | RawTable | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, query heads, key_dim], key and value alike: of all rows of a step, one behind the other.
        Writes output [tokens, query heads, value_dim].
        """
        # vLLM's trial run, before there are any pages.
        if attn_metadata is None:
            return output
        assert self._site is not None
        raw, packed = _tables(layer.layer_name, attn_metadata)
        basis, pools = self._basis_like(query), self._pools_of(layer, kv_cache, key.dtype)
        storage, weighting = self._site.stored.layout.storage, self._site.weighting
        query, key, value = basis.of_queries(query), basis.of_keys(key), basis.of_values(value)
        for rows in raw.step.written:
            pages = pools.pages(rows, raw, packed)
            torch.ops.kvmix.append_paged(*append_arguments(rows.chunk(key, value), pages, storage))
        for rows in raw.step.read:
            chunk, pages = rows.chunk(key, value), pools.pages(rows, raw, packed)
            if self._exact_chunks:
                chunk = chunk.in_dtype(pages.dtype)
            if self._exact_chunks and rows.tokens > 1:
                attended = attend_exactly(rows.of(query), chunk, rows.held, pages, storage, weighting)
            else:
                attended = attend(rows.of(query), chunk, pages, storage, weighting)
            output[rows.slice] = basis.of_output(attended)
        return output

    def _basis_like(self, query: Tensor) -> Basis:
        if self._basis is None:
            assert self._site is not None
            self._basis = Basis.of(self._site.stored, self.num_heads, like=query)
        return self._basis

    def _pools_of(self, layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> Pools:
        if self._pools is None or self._pools[0] is not kv_cache:
            assert self._site is not None
            raw = get_forward_context().no_compile_layers.get(layer.layer_name + RAW)
            of_raw, of_packed = (kv_cache, None) if raw is None else (raw.kv_cache, kv_cache)
            self._pools = kv_cache, Pools.of(self._site.stored.layout, of_raw, of_packed, dtype)
        return self._pools[1]


def _tables(layer: str, own: PackedTable | RawTable) -> tuple[RawTable, PackedTable | None]:
    """The tables of a layer, of which `own` is that under its own name."""
    if isinstance(own, RawTable):
        return own, None
    of_layers = get_forward_context().attn_metadata
    return (of_layers if isinstance(of_layers, dict) else of_layers[0])[layer + RAW], own
