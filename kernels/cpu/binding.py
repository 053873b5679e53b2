"""attend and append on the CPU: the functions of cpu.cpp, called with the addresses of tensors.

Arguments and results are the reference's. Whatever cpu.cpp does not do, the reference does: prompts on an empty state,
which PyTorch's own attention serves best; other dtypes and layouts; and all of it where there is no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu.interface import (
    ELEMENTS,
    Attention,
    BlockFormat,
    Part,
    Shape,
    Side,
    Threads,
)
from kvmix_compile.kernels.cpu.library import Library, library
from kvmix_compile.kernels.format.packing import NIBBLE_BIAS, kept_range
from kvmix_compile.kernels.format.precision import TIERS, Axis, Precision
from kvmix_compile.kernels.format.state import SiteState, required_blocks
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

_NOTHING = torch.empty(0)

# Of a chunk and of a state: the ones that cpu.cpp is compiled for, where they differ.
MIXED = torch.float32, torch.float16


def append(chunk: Chunk, state: SiteState, storage: Storage) -> None:
    """As reference.append, byte for byte."""
    loaded = library()
    tokens, rows = chunk.key.shape[2], zip(chunk.lengths.tolist(), chunk.starts.tolist(), strict=True)
    ends = [length + tokens - start for length, start in rows]
    if loaded is None or not _served(chunk, state) or not _has_room(ends, state, storage):
        reference.append(chunk, state, storage)
        return
    chunk = _with_rows(chunk)
    key, value = _key_side(chunk, state), _value_side(chunk, state)
    formats = _block_formats(storage, key.dim, value.dim, state.dtype.itemsize)
    loaded.append(_shape(chunk, state, storage), key, value, *formats, _threads(loaded))


def attend(query: Tensor, chunk: Chunk, state: SiteState, storage: Storage, weighting: Weighting) -> Tensor:
    """As reference.attend, but for rounding. Its result depends neither on the number of threads nor on other rows."""
    loaded = library()
    rows, query_heads, tokens, _ = query.shape
    lengths = chunk.lengths.tolist()
    is_prompt = tokens > 1 and not any(lengths)
    # Nothing is read beyond a state's end, whatever a row's length is said to be.
    served = _has_room(lengths, state, storage) and query.dtype == chunk.key.dtype and _served(chunk, state)
    if loaded is None or is_prompt or not served:
        return reference.attend(query, chunk, state, storage, weighting)
    # All tensors are held until the call is over: some may be copies, of which it is given the addresses alone.
    query, chunk = query if query.stride()[3] == 1 else query.contiguous(), _with_rows(chunk)
    sink_logits, slopes = _by_head(weighting.sink_logits), _by_head(weighting.slopes)
    output = query.new_empty(rows, query_heads, tokens, chunk.value.shape[3], dtype=torch.float32)
    row_stride, head_stride, token_stride, _ = query.stride()
    attention = Attention(
        query=query.data_ptr(),
        row_stride=row_stride,
        head_stride=head_stride,
        token_stride=token_stride,
        shared=query_heads // chunk.key.shape[1],
        values_are_keys=chunk.values_are_keys(query),
        output=output.data_ptr(),
        scale=weighting.scale,
        softcap=weighting.softcap,
        sliding_window=weighting.sliding_window,
        attention_chunk=weighting.attention_chunk,
        sink_logits=sink_logits.data_ptr(),
        slopes=slopes.data_ptr(),
    )
    key, value = _key_side(chunk, state), _value_side(chunk, state)
    formats = _block_formats(storage, key.dim, value.dim, state.dtype.itemsize)
    loaded.attend(_shape(chunk, state, storage), key, value, *formats, attention, _threads(loaded))
    if query.dtype == torch.float16:
        # Rounded scales can lead a little beyond what is finite in half precision.
        output.clamp_(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
    return output.to(query.dtype)


def _served(chunk: Chunk, state: SiteState) -> bool:
    dtype = chunk.key.dtype
    return (
        dtype in ELEMENTS
        and chunk.value.dtype == dtype
        and (state.dtype == dtype or (dtype, state.dtype) == MIXED)
        and state.sink_v.dtype == state.recent_k.dtype == state.recent_v.dtype == state.dtype
        and all(map(Tensor.is_contiguous, (chunk.lengths, chunk.starts, *state.tensors())))
    )


def _has_room(lengths: Sequence[int], state: SiteState, storage: Storage) -> bool:
    """Whether the state has room for the blocks of rows of so many tokens."""
    return required_blocks(max(lengths, default=0), state.sinks, storage.recent, storage.window) <= state.blocks


def _threads(loaded: Library) -> Threads:
    return Threads(count=torch.get_num_threads(), parallel=loaded.parallel)


def _by_head(numbers: Tensor | None) -> Tensor:
    """As cpu.cpp takes them; of none, a tensor without an address."""
    return _NOTHING if numbers is None else numbers.float().contiguous()


def _with_rows(chunk: Chunk) -> Chunk:
    """The same elements, those of a row's channels side by side."""
    if chunk.key.stride()[3] == chunk.value.stride()[3] == 1:
        return chunk
    return chunk._replace(key=chunk.key.contiguous(), value=chunk.value.contiguous())


def _shape(chunk: Chunk, state: SiteState, storage: Storage) -> Shape:
    rows, heads, tokens, _ = chunk.key.shape
    return Shape(
        lengths=chunk.lengths.data_ptr(),
        starts=chunk.starts.data_ptr(),
        element=ELEMENTS[chunk.key.dtype],
        kept=ELEMENTS[state.dtype],
        rows=rows,
        heads=heads,
        tokens=tokens,
        sinks=state.sinks,
        capacity=state.blocks,
        slots=state.recent_slots,
        recent=storage.recent,
    )


def _key_side(chunk: Chunk, state: SiteState) -> Side:
    return _side(chunk.key, state.sink_k, state.packed_k, state.recent_k)


def _value_side(chunk: Chunk, state: SiteState) -> Side:
    return _side(chunk.value, state.sink_v, state.packed_v, state.recent_v)


def _side(chunk: Tensor, sink: Tensor, packed: Tensor, ring: Tensor) -> Side:
    row_stride, head_stride, token_stride, _ = chunk.stride()
    return Side(
        chunk=chunk.data_ptr(),
        row_stride=row_stride,
        head_stride=head_stride,
        token_stride=token_stride,
        dim=chunk.shape[3],
        sink=sink.data_ptr(),
        packed=packed.data_ptr(),
        ring=ring.data_ptr(),
    )


@lru_cache(maxsize=1024)
def _block_formats(storage: Storage, key_dim: int, value_dim: int, itemsize: int) -> tuple[BlockFormat, BlockFormat]:
    """Of the keys and of the values."""
    return (
        _block_format(storage.key, key_dim, itemsize, Axis.TOKENS),
        _block_format(storage.value, value_dim, itemsize, Axis.CHANNELS),
    )


def _block_format(precision: Precision, dim: int, itemsize: int, axis: Axis) -> BlockFormat:
    parts = [_part(part.precision, part.channels, axis) for part in precision.parts(dim)]
    return BlockFormat(
        bits=precision.bits,
        group=precision.group,
        scale_bits=precision.scale_bits,
        block_bytes=precision.block_bytes(dim, itemsize),
        part_count=len(parts),
        parts=(Part * TIERS)(*parts),
    )


def _part(precision: Precision, channels: int, axis: Axis) -> Part:
    zero_point_bias, log2_scale_bias = NIBBLE_BIAS.get(precision.bits, (0.0, 0.0))
    return Part(
        channels=channels,
        bits=precision.bits,
        margin=(1 - kept_range(precision, axis)) / 2,
        zero_point_bias=zero_point_bias,
        log2_scale_bias=log2_scale_bias,
    )
