"""What a call of cpu.cpp's functions is made of: its structures, of tensors' addresses, strides and sizes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu.interface import ELEMENTS, Attention, BlockFormat, Part, Shape, Side, Threads
from kvmix_compile.kernels.cpu.library import Library
from kvmix_compile.kernels.format.packing import NIBBLE_BIAS, kept_range
from kvmix_compile.kernels.format.precision import TIERS, Axis, Precision
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

_NOTHING = torch.empty(0)


def is_prompt(query: Tensor, lengths: list[int]) -> bool:
    """Whether these are the first tokens of all rows, which PyTorch's own attention serves best."""
    return query.shape[2] > 1 and not any(lengths)


def appended(loaded: Library, chunk: Chunk, shape: Shape, sides: tuple[Side, Side], storage: Storage) -> bool:
    """Whether it was done: not, and nothing is written, where something that is read lies in no page."""
    key, value = sides
    formats = _block_formats(storage, key.dim, value.dim, chunk.key.element_size())
    return loaded.append(shape, key, value, *formats, _threads(loaded))


def attended(
    loaded: Library,
    query: Tensor,
    chunk: Chunk,
    shape: Shape,
    sides: tuple[Side, Side],
    storage: Storage,
    weighting: Weighting,
) -> Tensor | None:
    """None where something that is read lies in no page."""
    rows, query_heads, tokens, _ = query.shape
    # All tensors are held until the call is over: some may be copies, of which it is given the addresses alone.
    query = query if query.stride()[3] == 1 else query.contiguous()
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
    key, value = sides
    formats = _block_formats(storage, key.dim, value.dim, query.element_size())
    if not loaded.attend(shape, key, value, *formats, attention, _threads(loaded)):
        return None
    if query.dtype == torch.float16:
        # Rounded scales can lead a little beyond what is finite in half precision.
        output.clamp_(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
    return output.to(query.dtype)


def with_rows(chunk: Chunk) -> Chunk:
    """The same elements, those of a row's channels side by side."""
    if chunk.key.stride()[3] == chunk.value.stride()[3] == 1:
        return chunk
    return chunk._replace(key=chunk.key.contiguous(), value=chunk.value.contiguous())


def shape_of(chunk: Chunk, sinks: int, capacity: int, slots: int, recent: int) -> Shape:
    """capacity, slots: packed blocks and recent tokens that a row has room for."""
    rows, heads, tokens, _ = chunk.key.shape
    return Shape(
        lengths=chunk.lengths.data_ptr(),
        starts=chunk.starts.data_ptr(),
        element=ELEMENTS[chunk.key.dtype],
        rows=rows,
        heads=heads,
        tokens=tokens,
        sinks=sinks,
        capacity=capacity,
        slots=slots,
        recent=recent,
    )


def side_of(chunk: Tensor, sink: Tensor, packed: Tensor, ring: Tensor) -> Side:
    """The keys or the values."""
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


def _threads(loaded: Library) -> Threads:
    return Threads(count=torch.get_num_threads(), parallel=loaded.parallel)


def _by_head(numbers: Tensor | None) -> Tensor:
    """As cpu.cpp takes them; of none, a tensor without an address."""
    return _NOTHING if numbers is None else numbers.float().contiguous()


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
