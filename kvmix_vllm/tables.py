"""Tables: what layers are told of a step, made once for all layers of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from kvmix_vllm.settings import ServingError
from kvmix_vllm.specs import PackedSpec, PackedWindowSpec
from kvmix_vllm.steps import Step

# vLLM's, which holds nothing.
NULL_BLOCK = 0


@dataclass(frozen=True)
class PackedTable:
    """pages: int32 [rows, pages], from the one on that a row's first block begins; negative where there is none."""

    pages: Tensor


@dataclass(frozen=True)
class RawTable:
    """pages: int32 [rows, pages], negative where there is none. step: the rows."""

    pages: Tensor
    step: Step


class TableBuilder(AttentionMetadataBuilder[Any]):
    """Makes either of what vLLM knows of a step."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Rows of one token come first: they are worked on together.
        self._init_reorder_batch_threshold(1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PackedTable | RawTable:
        """As of vLLM's builders.

        Raises ServingError where tokens are to see later ones.
        """
        if common_attn_metadata.causal is not True:
            raise ServingError("kvmix serves causal attention alone: serve this model without a plan")
        pages = common_attn_metadata.block_table_tensor
        held = pages.masked_fill(pages == NULL_BLOCK, -1)
        if isinstance(self.kv_cache_spec, PackedSpec | PackedWindowSpec):
            return PackedTable(held[:, self.kv_cache_spec.skipped_pages :].contiguous())
        return RawTable(held, self._step(common_attn_metadata))

    def _step(self, common: CommonAttentionMetadata) -> Step:
        starts = common.query_start_loc_cpu.tolist()
        tokens = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        totals = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
        held = [total - count for total, count in zip(totals.tolist(), tokens, strict=False)]
        lengths = common.compute_num_computed_tokens().long()
        return Step.of(tokens, held, lengths, shared_at=self.kv_cache_spec.shared_tokens)
