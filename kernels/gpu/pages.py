"""Pages (format/pages.py) as Triton's kernels are given them, and where in a pool tokens and blocks lie."""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import SiteState

# Bytes that packed blocks of pages are aligned to, so that several are loaded at once.
BLOCK_ALIGNMENT = 8


@dataclass(frozen=True)
class Places:
    """Where what rows hold lies, as kernels are given it.

    tensors: of a state all six; of pages no sinks, and raw ones for recent tokens.
    capacity: packed blocks that there is room for in each row of a state.
    most_tokens: that a row can have.
    arguments: the other ones by their names, constants and, of pages alone, tables and strides.
    widths: of the tables, which append is given besides.
    """

    tensors: tuple[Tensor | None, ...]
    capacity: int
    most_tokens: int
    arguments: dict[str, Any]
    widths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, state: SiteState | Pages) -> Places:
        """As given to append or attend."""
        return cls._of_pages(state) if isinstance(state, Pages) else cls._of_state(state)

    @classmethod
    def _of_state(cls, state: SiteState) -> Places:
        most_tokens = state.sinks + state.blocks * BLOCK_TOKENS + state.recent_slots
        return cls(state.tensors(), state.blocks, most_tokens, {"SINKS": state.sinks, "SLOTS": state.recent_slots})

    @classmethod
    def _of_pages(cls, pages: Pages) -> Places:
        arguments: dict[str, Any] = {"SINKS": pages.sinks, "SLOTS": 0, "raw": pages.raw, "packed": pages.packed}
        arguments |= {"raw_row": pages.raw.stride(0), "packed_row": pages.packed.stride(0)}
        pools = {"raw_k": pages.raw_k, "raw_v": pages.raw_v, "packed_k": pages.packed_k, "packed_v": pages.packed_v}
        for name, pool in pools.items():
            page, head, place, _ = pool.stride()
            arguments |= {f"{name}_page": page, f"{name}_head": head, f"{name}_place": place}
        arguments |= {"PAGE_TOKENS": pages.raw_tokens, "PAGE_BLOCKS": pages.packed_blocks}
        tensors = (None, None, pages.packed_k, pages.packed_v, pages.raw_k, pages.raw_v)
        widths = {"raw_width": pages.raw.shape[1], "packed_width": pages.packed.shape[1]}
        return cls(tensors, 0, pages.raw.shape[1] * pages.raw_tokens, arguments, widths)


@triton.jit
def bytes_to_blocks(table, first, end, page_stride, block_stride, BLOCKS: tl.constexpr, PAGE: tl.constexpr):
    """From where a head's part of a pool begins to each of BLOCKS blocks from the first on, or to the last one before
    `end` again: a tuple of int64. Once for a tile: an entry that each thread looked up for each byte would cost as much
    as all the rest.
    """
    found = tl.tuple([])
    for index in tl.static_range(BLOCKS):
        block = tl.minimum(first + index, end - 1)
        page = tl.load(table + block // PAGE).to(tl.int64)
        found += (page * page_stride + block % PAGE * block_stride,)
    return found


@triton.jit
def offset_in_pages(number, exists, table, page_stride, place_stride, PAGE: tl.constexpr):
    """From where a head's part of a pool begins to a token or a block, int64 in units of the strides. PAGE: of a page.

    table: pointer to the row's entries, of which those are read alone of what exists.
    """
    page = tl.load(table + number // PAGE, mask=exists, other=0).to(tl.int64)
    return page * page_stride + number % PAGE * place_stride
