"""attend and append on the CPU: the functions of cpu.cpp, called with the addresses of tensors.

Arguments and results are the reference's. Whatever cpu.cpp does not do, the reference does: prompts on an empty state,
which PyTorch's own attention serves best; quantizing blocks; other dtypes and layouts; and all of it where there is no
library.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.kernels.format.precision import QUARTERS, Precision
from kvmix_compile.kernels.format.state import packed_blocks, required_blocks
from kvmix_compile.kernels.weighting import Weighting

# As cpu.cpp numbers them.
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Its structures: a Shape and two Sides make AppendArguments, and the beginning of AttendArguments.
SHAPE_AND_SIDES = struct.Struct("=10q 21q 21q")
ATTEND_ONLY = struct.Struct("=12q 2d")

_NOTHING = torch.empty(0)


def append(
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    packed_k: Tensor,
    packed_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    key: Precision,
    value: Precision,
    recent: int,
    window: int = 0,
) -> None:
    """As reference.append, byte for byte."""
    loaded = library()
    state = sink_k, sink_v, packed_k, packed_v, tail_k, tail_v
    served = _served(k, v, lengths, starts, state)
    if loaded is None or not served or _packs(k, lengths, starts, sink_k, packed_k, recent, window):
        reference.append(k, v, lengths, starts, *state, key, value, recent, window)
        return
    k, v = _with_rows(k), _with_rows(v)
    loaded.copy_tokens(_shape_and_sides(k, v, lengths, starts, state, key, value, recent))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    packed_k: Tensor,
    packed_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    key: Precision,
    value: Precision,
    recent: int,
    weighting: Weighting,
) -> Tensor:
    """As reference.attend, but for rounding. Its result depends neither on the number of threads nor on other rows."""
    loaded = library()
    state = sink_k, sink_v, packed_k, packed_v, tail_k, tail_v
    rows, query_heads, tokens, _ = q.shape
    longest = max(lengths.tolist(), default=0)
    is_prompt = tokens > 1 and longest == 0
    # Nothing is read beyond a state's end, whatever a row's length is said to be.
    fits = required_blocks(longest, sink_k.shape[2], recent, weighting.window) <= packed_k.shape[2]
    served = fits and q.dtype == k.dtype and _served(k, v, lengths, starts, state)
    if loaded is None or is_prompt or not served:
        return reference.attend(q, k, v, lengths, starts, *state, key, value, recent, weighting)
    q, k, v = _with_rows(q), _with_rows(k), _with_rows(v)
    output = q.new_empty(rows, query_heads, tokens, v.shape[3], dtype=torch.float32)
    row_stride, head_stride, token_stride, _ = q.stride()
    # Held until the call is over: they may be copies.
    sink_logits, slopes = _by_head(weighting.sink_logits), _by_head(weighting.slopes)
    loaded.attend(
        _shape_and_sides(k, v, lengths, starts, state, key, value, recent)
        + ATTEND_ONLY.pack(
            *(q.data_ptr(), row_stride, head_stride, token_stride, output.data_ptr()),
            *(query_heads // k.shape[1], weighting.sliding_window, weighting.attention_chunk),
            *(sink_logits.data_ptr(), slopes.data_ptr()),
            *(torch.get_num_threads(), loaded.parallel, weighting.scale, weighting.softcap),
        )
    )
    if q.dtype == torch.float16:
        # Rounded scales can lead a little beyond what is finite in half precision.
        output.clamp_(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
    return output.to(q.dtype)


def _served(k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor, state: tuple[Tensor, ...]) -> bool:
    sink_k, sink_v, _, _, tail_k, tail_v = state
    dtype = k.dtype
    return (
        dtype in ELEMENTS
        and v.dtype == sink_k.dtype == sink_v.dtype == tail_k.dtype == tail_v.dtype == dtype
        and all(map(Tensor.is_contiguous, (lengths, starts, *state)))
    )


def _packs(
    k: Tensor, lengths: Tensor, starts: Tensor, sink_k: Tensor, packed_k: Tensor, recent: int, window: int
) -> bool:
    """Whether the chunk completes a block, or leaves the state with more of them than it has room for."""
    tokens, sinks, room = k.shape[2], sink_k.shape[2], packed_k.shape[2]
    for length, start in zip(lengths.tolist(), starts.tolist(), strict=True):
        end = length + tokens - start
        if required_blocks(end, sinks, recent, window) > room:
            return True
        if packed_blocks(end, sinks, recent) > packed_blocks(length, sinks, recent):
            return True
    return False


def _by_head(numbers: Tensor | None) -> Tensor:
    """As cpu.cpp takes them; of none, a tensor without an address."""
    return _NOTHING if numbers is None else numbers.float().contiguous()


def _with_rows(tensor: Tensor) -> Tensor:
    """The same elements, those of a row's channels side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@lru_cache
def _format(precision: Precision, dim: int, itemsize: int) -> tuple[int, ...]:
    parts = [number for part in precision.parts(dim) for number in (part.channels, part.precision.bits)]
    return (
        *(dim, precision.bits, precision.group, precision.scale_bits, precision.block_bytes(dim, itemsize)),
        *(len(parts) // 2, *parts, *[0] * (2 * QUARTERS - len(parts))),
    )


def _shape_and_sides(
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor,
    state: tuple[Tensor, ...],
    key: Precision,
    value: Precision,
    recent: int,
) -> bytes:
    sink_k, sink_v, packed_k, packed_v, tail_k, tail_v = state
    rows, heads, tokens, key_dim = k.shape
    key_row_stride, key_head_stride, key_token_stride, _ = k.stride()
    value_row_stride, value_head_stride, value_token_stride, _ = v.stride()
    itemsize = k.element_size()
    return SHAPE_AND_SIDES.pack(
        *(lengths.data_ptr(), starts.data_ptr(), ELEMENTS[k.dtype], rows, heads, tokens),
        *(sink_k.shape[2], packed_k.shape[2], tail_k.shape[2], recent),
        *(k.data_ptr(), key_row_stride, key_head_stride, key_token_stride),
        *(sink_k.data_ptr(), packed_k.data_ptr(), tail_k.data_ptr(), *_format(key, key_dim, itemsize)),
        *(v.data_ptr(), value_row_stride, value_head_stride, value_token_stride),
        *(sink_v.data_ptr(), packed_v.data_ptr(), tail_v.data_ptr(), *_format(value, v.shape[3], itemsize)),
    )
