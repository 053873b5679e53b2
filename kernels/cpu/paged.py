"""attend and append over pages on the CPU, by the same functions of cpu.cpp as over a state.

Arguments and results are those of the reference, kernels/paged.py, which also does what cpu.cpp does not: as in
binding.py; and it says which page is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_compile.kernels import paged
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu.call import appended, attended, is_prompt, shape_of, side_of, with_rows
from kvmix_compile.kernels.cpu.interface import ELEMENTS, Shape, Side, Strides, Table
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

# Places that a row has: as many as it has pages for.
_UNBOUNDED = 2**40


def append(chunk: Chunk, pages: Pages, storage: Storage) -> None:
    """As paged.append, byte for byte."""
    loaded = library()
    if loaded is not None and _served(chunk, pages):
        rows = with_rows(chunk)
        if appended(loaded, rows, _shape(rows, pages, storage), _sides(rows, pages), storage):
            return
    paged.append(chunk, pages, storage)


def attend(query: Tensor, chunk: Chunk, pages: Pages, storage: Storage, weighting: Weighting) -> Tensor:
    """As paged.attend, but for rounding: to the bit what attend gives over a state that holds the same."""
    loaded = library()
    served = query.dtype == chunk.key.dtype and _served(chunk, pages)
    if loaded is not None and served and not is_prompt(query, chunk.lengths.tolist()):
        rows = with_rows(chunk)
        sides, shape = _sides(rows, pages), _shape(rows, pages, storage)
        result = attended(loaded, query, rows, shape, sides, storage, weighting)
        if result is not None:
            return result
    return paged.attend(query, chunk, pages, storage, weighting)


def _served(chunk: Chunk, pages: Pages) -> bool:
    dtype = chunk.key.dtype
    return (
        dtype in ELEMENTS
        and chunk.value.dtype == pages.raw_k.dtype == pages.raw_v.dtype == dtype
        and pages.raw.dtype == pages.packed.dtype == torch.int32
        and chunk.lengths.is_contiguous()
        and chunk.starts.is_contiguous()
        and all(tensor.stride()[-1] == 1 for tensor in pages.tensors())
    )


def _shape(chunk: Chunk, pages: Pages, storage: Storage) -> Shape:
    shape = shape_of(chunk, pages.sinks, capacity=_UNBOUNDED, slots=_UNBOUNDED, recent=storage.recent)
    shape.raw, shape.packed = _table(pages.raw, pages.raw_k), _table(pages.packed, pages.packed_k)
    return shape


def _table(table: Tensor, pool: Tensor) -> Table:
    count, _, size, _ = pool.shape
    return Table(pages=table.data_ptr(), stride=table.stride()[0], width=table.shape[1], size=size, count=count)


def _sides(chunk: Chunk, pages: Pages) -> tuple[Side, Side]:
    """The keys and the values."""
    return (
        _side(chunk.key, pages.raw_k, pages.packed_k),
        _side(chunk.value, pages.raw_v, pages.packed_v),
    )


def _side(chunk: Tensor, raw: Tensor, packed: Tensor) -> Side:
    side = side_of(chunk, raw, packed, raw)
    side.raw_strides, side.packed_strides = _strides(raw), _strides(packed)
    return side


def _strides(pool: Tensor) -> Strides:
    page, head, place, _ = pool.stride()
    size = pool.element_size()
    return Strides(page=page * size, head=head * size, place=place * size)
