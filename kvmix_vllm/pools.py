"""Pools: the pages that vLLM allotted to a layer, as kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_vllm.steps import Rows
from kvmix_vllm.tables import PackedTable, RawTable


@dataclass(frozen=True)
class Pools:
    """As of kernels.format.pages.Pages."""

    raw_k: Tensor
    raw_v: Tensor
    packed_k: Tensor
    packed_v: Tensor
    sinks: int

    @classmethod
    def of(cls, layout: StateLayout, raw: Tensor, packed: Tensor | None, dtype: torch.dtype) -> Pools:
        """Of one layer of a model in this dtype.

        raw: uint8 [pages, heads, tokens, bytes of a key and a value]. packed: uint8 [pages, heads, blocks, bytes of the
        keys and the values of a block]; None where nothing is packed.
        """
        raw_k, raw_v = raw.view(layout.unquantized_dtype(dtype)).split([layout.key_dim, layout.value_dim], dim=-1)
        sizes = [
            layout.key.block_bytes(layout.key_dim, dtype.itemsize),
            layout.value.block_bytes(layout.value_dim, dtype.itemsize),
        ]
        packed = raw.new_empty(0, raw.shape[1], 1, sum(sizes)) if packed is None else packed
        packed_k, packed_v = packed.split(sizes, dim=-1)
        return cls(raw_k, raw_v, packed_k, packed_v, layout.sinks)

    def pages(self, rows: Rows, raw: RawTable, packed: PackedTable | None) -> Pages:
        """Those of some rows of a step."""
        chosen = slice(rows.first, rows.end)
        return Pages(
            raw=raw.pages[chosen],
            packed=raw.pages[chosen, :0] if packed is None else packed.pages[chosen],
            raw_k=self.raw_k,
            raw_v=self.raw_v,
            packed_k=self.packed_k,
            packed_v=self.packed_v,
            sinks=self.sinks,
        )
