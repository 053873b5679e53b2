"""What vLLM is told of the pages: which layers share a block table, how large a page is, how many a request takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_vllm.pages import ALIGNMENT, Kept, PackedPage, Paging, raw_bytes, skipped_blocks

# Pages are bytes to vLLM, all of them: a block that it hands from one group to the other need not be zeroed then.
PAGE_DTYPE = torch.uint8


@dataclass(frozen=True, kw_only=True)
class PackedSpec(FullAttentionSpec):
    """Pages of packed blocks: of all tokens, as with full attention, 32 of them in a state.

    skipped_pages: of a row, those in front of its first block.
    """

    skipped_pages: int

    @classmethod
    def of(cls, layout: StateLayout, page: PackedPage) -> Self:
        """One layer's."""
        return cls(**_of_packed(layout, page))

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """As of vLLM's specs: of layers that are alike."""
        assert all(spec == specs[0] for spec in specs), "layers of different pages are no single spec"
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class KeptSpec(AttentionSpec):
    """Pages of some of a row's places, and of no others."""

    kept: Kept

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Of a request of the longest text, which grows a token at a time."""
        return self.kept.most_pages(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        """Whether all of these are of one kind, and keep the same."""
        return all(type(spec) is type(self) and spec.kept == self.kept for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class PackedWindowSpec(KeptSpec):
    """Pages of packed blocks of a layer that sees a window.

    skipped_pages: as in PackedSpec. window: the tokens that one sees.
    """

    skipped_pages: int
    window: int

    @classmethod
    def of(cls, layout: StateLayout, page: PackedPage) -> Self:
        """One layer's."""
        kept = page.kept(layout)
        assert kept is not None
        return cls(**_of_packed(layout, page), kept=kept, window=layout.window)


@dataclass(frozen=True, kw_only=True)
class RawSpec(KeptSpec):
    """Pages of unquantized tokens: those that a row keeps so.

    shared_tokens: as in Paging.
    """

    shared_tokens: int

    @classmethod
    def of(cls, layout: StateLayout, pages: Paging, dtype: torch.dtype) -> Self:
        """One layer's."""
        return cls(
            block_size=pages.raw_tokens,
            num_kv_heads=layout.kv_heads,
            head_size=layout.key_dim,
            head_size_v=layout.value_dim,
            dtype=PAGE_DTYPE,
            state_content_bytes=raw_bytes(layout, dtype),
            block_stride_alignment=ALIGNMENT,
            kept=Kept.of(layout, pages.raw_tokens),
            shared_tokens=pages.shared_tokens,
        )


def _of_packed(layout: StateLayout, page: PackedPage) -> dict[str, Any]:
    """What the specs of one layer's packed pages have in common."""
    return {
        "block_size": page.tokens,
        "num_kv_heads": page.heads,
        "head_size": layout.key_dim,
        "head_size_v": layout.value_dim,
        "dtype": PAGE_DTYPE,
        "tokens_per_state": BLOCK_TOKENS,
        "state_content_bytes": page.block_bytes,
        "page_size_padded": page.nbytes if page.padding else None,
        "block_stride_alignment": ALIGNMENT,
        "skipped_pages": skipped_blocks(layout) // page.blocks,
    }
