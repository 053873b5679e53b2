"""Quantize-on-write: a chunk's keys and values enter the state in one launch. What it computes: reference.py's append.

For a row, a head and one side (keys or values) unit 0 packs the blocks that hold tokens of the ring and then writes the
ring and the sink; the units behind it pack a block of the chunk each. Which blocks are complete is decided on the
device, from the row's own length: the host reads nothing. In pages (format/pages.py) no token takes the place of
another, and each unit writes 32 of the chunk's tokens.

A block is packed in two steps, as a reader will find it: scales and zero points are written, and codes computed from
what was written.
"""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.packing import (
    FLOAT16_MAX,
    LOG2_SCALE_RANGE,
    NIBBLE_BIAS,
    NIBBLE_LEVELS,
    SMALLEST_SCALE,
    kept_range,
)
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Axis, Precision
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.gpu.pages import Places, offset_in_pages
from kvmix_compile.kernels.gpu.unpack import BlockFormat, exact_log2, load_metadata, nibble_step, part_of

_TOKENS = tl.constexpr(BLOCK_TOKENS)
_FLOAT16_MAX = tl.constexpr(FLOAT16_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_LOG2_SCALE_RANGE = tl.constexpr(LOG2_SCALE_RANGE)
_NIBBLE_LEVELS = tl.constexpr(float(NIBBLE_LEVELS))

# Added to a float from 0 to 2**22 it leaves no bits for a fraction: the sum is rounded, halves to even.
_WHOLE = tl.constexpr(8388608.0)


@dataclass(frozen=True)
class BlockWriter:
    """What packing a part of a block needs beside its format, as the constants a kernel is compiled for.

    padded_dim: channels of the whole head, padded to a power of two.
    margin: the share of a group's range cut off at either end; zero_point_bias, log2_scale_bias: see NIBBLE_BIAS.
    """

    by_tokens: bool
    levels: int
    groups: int
    padded_groups: int
    padded_group: int
    padded_dim: int
    margin: float
    zero_point_bias: float
    log2_scale_bias: float

    @classmethod
    def parts(cls, precision: Precision, axis: Axis, head_dim: int) -> tuple[BlockWriter, ...]:
        """As BlockFormat.parts."""
        return tuple(cls._of(part.precision, axis, part.channels, head_dim) for part in precision.parts(head_dim))

    @classmethod
    def _of(cls, precision: Precision, axis: Axis, channels: int, head_dim: int) -> BlockWriter:
        quantized = precision.is_quantized
        groups = precision.groups(channels) if quantized else 1
        zero_point_bias, log2_scale_bias = NIBBLE_BIAS[precision.bits] if quantized else (0.0, 0.0)
        return cls(
            by_tokens=axis == Axis.TOKENS,
            levels=precision.levels,
            groups=groups,
            padded_groups=triton.next_power_of_2(groups),
            padded_group=triton.next_power_of_2(precision.group),
            padded_dim=triton.next_power_of_2(head_dim),
            margin=(1 - kept_range(precision, axis)) / 2,
            zero_point_bias=zero_point_bias,
            log2_scale_bias=log2_scale_bias,
        )


@triton.jit
def append_kernel(
    k,
    v,
    lengths,
    starts,
    sink_k,  # of pages None
    sink_v,
    packed_k,
    packed_v,
    recent_k,  # of pages the raw ones
    recent_v,
    k_row,  # strides, in elements
    k_head,
    k_token,
    k_channel,
    v_row,
    v_head,
    v_token,
    v_channel,
    tokens,  # of the chunk, padding counted
    capacity,  # packed blocks
    WINDOWED: tl.constexpr,  # later blocks may take the places of earlier ones
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,  # the formats of a block's parts
    KEY_WRITERS: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_WRITERS: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    SLOTS: tl.constexpr,
    raw=None,  # tables of pages, their strides and widths, and the strides of pools (pages.py); of a state none
    packed=None,
    raw_row=None,
    packed_row=None,
    raw_width=None,
    packed_width=None,
    raw_k_page=None,
    raw_k_head=None,
    raw_k_place=None,
    raw_v_page=None,
    raw_v_head=None,
    raw_v_place=None,
    packed_k_page=None,
    packed_k_head=None,
    packed_k_place=None,
    packed_v_page=None,
    packed_v_head=None,
    packed_v_place=None,
    PAGE_TOKENS: tl.constexpr = 0,
    PAGE_BLOCKS: tl.constexpr = 0,
):
    """One unit of one row, head and side, as the head of this file divides the work."""
    state_head = tl.program_id(0).to(tl.int64)
    row, head = state_head // HEADS, state_head % HEADS
    unit = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    start = tl.load(starts + row).to(tl.int32)
    head_of_k, head_of_v = k + row * k_row + head * k_head, v + row * v_row + head * v_head
    if PAGE_TOKENS > 0:
        row_of_raw, row_of_packed = raw + row * raw_row, packed + row * packed_row
        if tl.program_id(2) == 0:
            _append_to_pages(
                *(head_of_k, k_token, k_channel),
                (recent_k + head * raw_k_head, row_of_raw, raw_width, raw_k_page, raw_k_place),
                (packed_k + head * packed_k_head, row_of_packed, packed_width, packed_k_page, packed_k_place),
                *(length, start, tokens, unit),
                *(KEYS, KEY_WRITERS, SINKS, RECENT, PAGE_TOKENS, PAGE_BLOCKS),
            )
        else:
            _append_to_pages(
                *(head_of_v, v_token, v_channel),
                (recent_v + head * raw_v_head, row_of_raw, raw_width, raw_v_page, raw_v_place),
                (packed_v + head * packed_v_head, row_of_packed, packed_width, packed_v_page, packed_v_place),
                *(length, start, tokens, unit),
                *(VALUES, VALUE_WRITERS, SINKS, RECENT, PAGE_TOKENS, PAGE_BLOCKS),
            )
    elif tl.program_id(2) == 0:
        _append(
            head_of_k,
            k_token,
            k_channel,
            sink_k + state_head * SINKS * KEYS[0].head_dim,
            packed_k + state_head * capacity * KEYS[0].block_bytes,
            recent_k + state_head * SLOTS * KEYS[0].head_dim,
            length,
            start,
            tokens,
            capacity,
            unit,
            WINDOWED,
            KEYS,
            KEY_WRITERS,
            SINKS,
            RECENT,
            SLOTS,
        )
    else:
        _append(
            head_of_v,
            v_token,
            v_channel,
            sink_v + state_head * SINKS * VALUES[0].head_dim,
            packed_v + state_head * capacity * VALUES[0].block_bytes,
            recent_v + state_head * SLOTS * VALUES[0].head_dim,
            length,
            start,
            tokens,
            capacity,
            unit,
            WINDOWED,
            VALUES,
            VALUE_WRITERS,
            SINKS,
            RECENT,
            SLOTS,
        )


@triton.jit
def _append(
    chunk,
    chunk_token,
    chunk_channel,
    sink,
    packed,
    ring,
    length,
    start,
    tokens,
    capacity,
    unit,
    WINDOWED: tl.constexpr,
    FORMATS: tl.constexpr,
    WRITERS: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    FORMAT: tl.constexpr = FORMATS[0]
    WRITER: tl.constexpr = WRITERS[0]
    # So that the row's token u lies at chunk + u * chunk_token.
    chunk += (start - length).to(tl.int64) * chunk_token
    end = tl.maximum(length + tokens - start, length)
    complete = _blocks(end - SINKS - RECENT)
    if not WINDOWED:
        complete = tl.minimum(complete, capacity)
    begin, until = _blocks_of_unit(unit, length, SINKS, RECENT)
    until = tl.minimum(until, complete)
    # Of more blocks than there is room for, the first ones are seen by nothing that follows.
    for block in tl.range(tl.maximum(begin, complete - capacity), until, num_stages=1):
        target = packed + (block % capacity if WINDOWED else block) * FORMAT.block_bytes
        first = SINKS + block * _TOKENS
        _pack_block(
            *(target, first, chunk, chunk_token, chunk_channel, (ring,), length, FORMATS, WRITERS, SINKS, SLOTS)
        )
    if unit == 0:
        # Only now may the ring be overwritten: the tokens just packed lay in it.
        tl.debug_barrier()
        in_sink = tl.minimum(end, SINKS)
        _copy_tokens(sink, chunk, chunk_token, chunk_channel, length, in_sink, 0, SINKS, FORMAT, WRITER)
        oldest = tl.maximum(tl.maximum(length, SINKS), end - SLOTS)
        _copy_tokens(ring, chunk, chunk_token, chunk_channel, oldest, end, SINKS, SLOTS, FORMAT, WRITER)


@triton.jit
def _append_to_pages(
    chunk,
    chunk_token,
    chunk_channel,
    raw,
    packed,
    length,
    start,
    tokens,
    unit,
    FORMATS: tl.constexpr,
    WRITERS: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
):
    """raw, packed: (pool of the head, the row's entries of the table, how many these are, strides from page to page and
    from token or block to the next).
    """
    # So that the row's token u lies at chunk + u * chunk_token.
    chunk += (start - length).to(tl.int64) * chunk_token
    end = tl.maximum(length + tokens - start, length)
    raw_pool, raw_entries, raw_width, raw_page, raw_place = raw
    packed_pool, packed_entries, packed_width, packed_page, packed_place = packed
    waiting = (raw_pool, raw_entries, raw_page, raw_place)
    begin, until = _blocks_of_unit(unit, length, SINKS, RECENT)
    for block in tl.range(begin, tl.minimum(until, _blocks(end - SINKS - RECENT)), num_stages=1):
        page = tl.load(packed_entries + block // PAGE_BLOCKS, mask=block // PAGE_BLOCKS < packed_width, other=-1)
        # What has no page is left out.
        if page >= 0:
            target = packed_pool + page.to(tl.int64) * packed_page + block % PAGE_BLOCKS * packed_place
            first = SINKS + block * _TOKENS
            _pack_block(
                *(target, first, chunk, chunk_token, chunk_channel, waiting, length),
                *(FORMATS, WRITERS, SINKS, PAGE_TOKENS),
            )
    token = length + unit * _TOKENS + tl.arange(0, _TOKENS)
    index = token // PAGE_TOKENS
    page = tl.load(raw_entries + index, mask=(token < end) & (index < raw_width), other=-1)
    target = raw_pool + page.to(tl.int64) * raw_page + token % PAGE_TOKENS * raw_place
    channel = tl.arange(0, WRITERS[0].padded_dim)[None, :]
    mask = (page >= 0)[:, None] & (channel < FORMATS[0].head_dim)
    elements = tl.load(chunk + (token.to(tl.int64) * chunk_token)[:, None] + channel * chunk_channel, mask=mask)
    tl.store(target[:, None] + channel, elements, mask=mask)


@triton.jit
def _blocks_of_unit(unit, length, SINKS: tl.constexpr, RECENT: tl.constexpr):
    """From which to which block a unit packs those that are complete."""
    packed_already = _blocks(length - SINKS - RECENT)
    # From this block on all tokens are the chunk's.
    fresh = tl.maximum(packed_already, _blocks(length - SINKS))
    begin = tl.where(unit == 0, packed_already, fresh + unit - 1)
    return begin, tl.where(unit == 0, fresh, begin + 1)


@triton.jit
def _blocks(tokens):
    """Blocks these tokens would fill, the last one perhaps in part; none where they are negative."""
    return (tl.maximum(tokens, 0) + _TOKENS - 1) // _TOKENS


@triton.jit
def _copy_tokens(
    slots,
    chunk,
    chunk_token,
    chunk_channel,
    first,
    end,
    ORIGIN: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
    WRITER: tl.constexpr,
):
    """Token u of the chunk goes to slot (u - ORIGIN) % SLOTS."""
    channel = tl.arange(0, WRITER.padded_dim)[None, :]
    if SLOTS > 0:
        for tile in tl.range(first, end, _TOKENS, num_stages=1):
            token = (tile + tl.arange(0, _TOKENS))[:, None]
            mask = (token < end) & (channel < FORMAT.head_dim)
            elements = tl.load(chunk + token.to(tl.int64) * chunk_token + channel * chunk_channel, mask=mask)
            tl.store(slots + (token - ORIGIN) % SLOTS * FORMAT.head_dim + channel, elements, mask=mask)


@triton.jit
def _load_tokens(
    token,
    channel,
    mask,
    chunk,
    chunk_token,
    chunk_channel,
    waiting,
    length,
    DIM,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Elements of tokens that waited to be packed or, from number `length` on, of the chunk's.

    waiting: (ring,), which has so many slots; or of pages of as many tokens (pool, the row's entries of the table,
    strides from page to page and from token to token).
    """
    is_old = mask & (token < length)
    if len(waiting) > 1:
        pool, entries, page_stride, token_stride = waiting
        rows = pool + offset_in_pages(token, is_old, entries, page_stride, token_stride, SLOTS)
    else:
        slot = tl.where(token < length, token - SINKS, 0) % SLOTS
        rows = waiting[0] + slot * DIM
    old = tl.load(rows + channel, mask=is_old, other=0.0)
    new = tl.load(
        chunk + token.to(tl.int64) * chunk_token + channel * chunk_channel, mask=mask & (token >= length), other=0.0
    )
    return tl.where(token < length, old, new)


@triton.jit
def _pack_block(
    target,
    first,
    chunk,
    chunk_token,
    chunk_channel,
    waiting,
    length,
    FORMATS: tl.constexpr,
    WRITERS: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """first: the block's first token; waiting, SLOTS: as _load_tokens takes them."""
    for part in tl.static_range(len(FORMATS)):
        channel = FORMATS[part].first_channel
        _pack_part(
            target + FORMATS[part].first_byte,
            first,
            chunk + channel * chunk_channel,
            chunk_token,
            chunk_channel,
            (waiting[0] + channel,) + waiting[1:],
            length,
            part_of(FORMATS, part),
            part_of(WRITERS, part),
            SINKS,
            SLOTS,
        )


@triton.jit
def _pack_part(
    target,
    first,
    chunk,
    chunk_token,
    chunk_channel,
    waiting,
    length,
    FORMAT: tl.constexpr,
    WRITER: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """target, chunk and what waits: pointers to where the part's own bytes and channels begin."""
    if FORMAT.bits == 16:
        _copy_block(target, first, chunk, chunk_token, chunk_channel, waiting, length, FORMAT, WRITER, SINKS, SLOTS)
    else:
        _write_metadata(target, first, chunk, chunk_token, chunk_channel, waiting, length, FORMAT, WRITER, SINKS, SLOTS)
        # Other threads of this program read what was written.
        tl.debug_barrier()
        LOW: tl.constexpr = 8 // FORMAT.slices
        _write_plane(
            *(target, first, chunk, chunk_token, chunk_channel, waiting, length, 0, LOW),
            *(FORMAT, WRITER, SINKS, SLOTS),
        )
        if FORMAT.bits == 3:
            _write_plane(
                *(target, first, chunk, chunk_token, chunk_channel, waiting, length, 2, 1),
                *(FORMAT, WRITER, SINKS, SLOTS),
            )


@triton.jit
def _copy_block(
    target,
    first,
    chunk,
    chunk_token,
    chunk_channel,
    waiting,
    length,
    FORMAT: tl.constexpr,
    WRITER: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    place = tl.arange(0, _TOKENS)[:, None]
    channel = tl.arange(0, WRITER.padded_dim)[None, :]
    mask = (place >= 0) & (channel < FORMAT.head_dim)
    elements = _load_tokens(
        *(first + place, channel, mask, chunk, chunk_token, chunk_channel, waiting, length),
        *(FORMAT.head_dim, SINKS, SLOTS),
    )
    typed = target.to(tl.pointer_type(elements.dtype))
    tl.store(typed + place * FORMAT.head_dim + channel, elements, mask=mask)


@triton.jit
def _write_metadata(
    target,
    first,
    chunk,
    chunk_token,
    chunk_channel,
    waiting,
    length,
    FORMAT: tl.constexpr,
    WRITER: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    index = tl.arange(0, WRITER.padded_groups)
    within = tl.arange(0, WRITER.padded_group)[None, :]
    if WRITER.by_tokens:
        place = (index // FORMAT.channels * FORMAT.group)[:, None] + within
        channel = (index % FORMAT.channels)[:, None]
    else:
        PER_TOKEN: tl.constexpr = FORMAT.channels // FORMAT.group
        place = (index // PER_TOKEN)[:, None]
        channel = (index % PER_TOKEN * FORMAT.group)[:, None] + within
    is_group = index < WRITER.groups
    mask = is_group[:, None] & (within < FORMAT.group)
    elements = _load_tokens(
        *(first + place, channel, mask, chunk, chunk_token, chunk_channel, waiting, length),
        *(FORMAT.head_dim, SINKS, SLOTS),
    )
    elements = _clamped(elements)
    lowest = tl.min(tl.where(mask, elements, float("inf")), 1)
    highest = tl.max(tl.where(mask, elements, float("-inf")), 1)
    # The padding's groups are numbers, too, so that nothing below meets an infinity.
    lowest, highest = tl.where(is_group, lowest, 0.0), tl.where(is_group, highest, 0.0)
    metadata = target + FORMAT.code_bytes
    halves = metadata.to(tl.pointer_type(tl.float16))
    if FORMAT.scale_bits == 16:
        zero_point = lowest.to(tl.float16)
        scale = _divided(highest - zero_point.to(tl.float32), WRITER.levels)
        scale = tl.minimum(tl.maximum(scale, 0.0), _FLOAT16_MAX).to(tl.float16)
        tl.store(halves + index, scale, mask=is_group)
        tl.store(halves + WRITER.groups + index, zero_point, mask=is_group)
    else:
        margin = (highest - lowest) * WRITER.margin
        lowest, highest = lowest + margin, highest - margin
        zero_low, zero_high = _extremes(lowest, is_group)
        zero_nibble = _to_nibble(lowest, zero_low, zero_high, WRITER.zero_point_bias)
        zero_point = zero_nibble * nibble_step(zero_low, zero_high) + zero_low
        log2_scale = exact_log2(tl.maximum(_divided(highest - zero_point, WRITER.levels), _SMALLEST_SCALE))
        floor = tl.max(tl.where(is_group, log2_scale, float("-inf")), 0, keep_dims=True) - _LOG2_SCALE_RANGE
        log2_scale = tl.maximum(log2_scale, floor)
        scale_low, scale_high = _extremes(log2_scale, is_group)
        scale_nibble = _to_nibble(log2_scale, scale_low, scale_high, WRITER.log2_scale_bias)
        one = tl.arange(0, 1)
        tl.store(halves + one, scale_low.to(tl.float16))
        tl.store(halves + 1 + one, scale_high.to(tl.float16))
        tl.store(halves + 2 + one, zero_low.to(tl.float16))
        tl.store(halves + 3 + one, zero_high.to(tl.float16))
        nibbles = scale_nibble.to(tl.int32) | zero_nibble.to(tl.int32) << 4
        tl.store(metadata + 8 + index, nibbles.to(tl.uint8), mask=is_group)


@triton.jit
def _write_plane(
    target,
    first,
    chunk,
    chunk_token,
    chunk_channel,
    waiting,
    length,
    BELOW: tl.constexpr,  # bits of a code in the planes before this one
    BITS: tl.constexpr,  # bits of a field of this plane
    FORMAT: tl.constexpr,
    WRITER: tl.constexpr,
    SINKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = FORMAT.channels // FIELDS
    PADDED: tl.constexpr = FORMAT.padded_width * FORMAT.slices // FIELDS
    place = tl.arange(0, _TOKENS)[:, None, None]
    field = tl.arange(0, FIELDS)[None, :, None]
    within = tl.arange(0, PADDED)[None, None, :]
    channel = field * WIDTH + within
    mask = (place >= 0) & (field >= 0) & (within < WIDTH)
    elements = _load_tokens(
        *(first + place, channel, mask, chunk, chunk_token, chunk_channel, waiting, length),
        *(FORMAT.head_dim, SINKS, SLOTS),
    )
    if WRITER.by_tokens:
        group = place // FORMAT.group * FORMAT.channels + channel
    else:
        group = place * (FORMAT.channels // FORMAT.group) + channel // FORMAT.group
    scale, zero_point = load_metadata(target + FORMAT.code_bytes + 0 * group, group, mask, mask, FORMAT, 1, EXACT=True)
    step = tl.where(scale == 0, float("inf"), scale)
    code = _rounded(tl.div_rn(_clamped(elements) - zero_point, step), WRITER.levels).to(tl.int32)
    bits = (code >> BELOW & (2**BITS - 1)) << (field * BITS)
    byte = tl.sum(tl.where(mask, bits, 0), 1)
    places = tl.arange(0, PADDED)[None, :]
    plane = target + _TOKENS * FORMAT.channels * BELOW // 8
    address = plane + tl.arange(0, _TOKENS)[:, None] * WIDTH + places
    tl.store(address, byte.to(tl.uint8), mask=places < WIDTH)


@triton.jit
def _clamped(elements):
    return tl.minimum(tl.maximum(elements.to(tl.float32), -_FLOAT16_MAX), _FLOAT16_MAX)


@triton.jit
def _divided(numbers, levels):
    return tl.div_rn(numbers, tl.full(numbers.shape, levels, tl.float32))


@triton.jit
def _extremes(numbers, is_group):
    """The lowest and the highest, [1] each, as float16 holds them."""
    lowest = tl.min(tl.where(is_group, numbers, float("inf")), 0, keep_dims=True)
    highest = tl.max(tl.where(is_group, numbers, float("-inf")), 0, keep_dims=True)
    return lowest.to(tl.float16).to(tl.float32), highest.to(tl.float16).to(tl.float32)


@triton.jit
def _to_nibble(numbers, lowest, highest, bias):
    step = nibble_step(lowest, highest)
    step = tl.where(step == 0, float("inf"), step)
    return _rounded(tl.div_rn(numbers - lowest, tl.broadcast_to(step, numbers.shape)) + bias, _NIBBLE_LEVELS)


@triton.jit
def _rounded(numbers, most):
    """To the nearest of 0, 1 .. most, halves to even."""
    return tl.minimum(tl.maximum(numbers, 0.0), most) + _WHOLE - _WHOLE


@torch.no_grad()
def append(chunk: Chunk, state: SiteState | Pages, storage: Storage) -> None:
    """As reference.append, for contiguous state tensors, or as paged.append; never waits for the device.

    Lengths are not known to the host, so that a row without room for a block cannot be refused: such a block is not
    written. SiteState.grow makes room before. Nor can pages be refused that are missing.
    """
    key, value = chunk.key, chunk.value
    rows, heads, tokens, key_dim = key.shape
    value_dim, itemsize = value.shape[3], key.element_size()
    if rows == 0 or heads == 0 or tokens == 0:
        return
    places = Places.of(state)
    units = 1 + tokens // BLOCK_TOKENS
    append_kernel[(rows * heads, units, 2)](
        *(key, value, chunk.lengths, chunk.starts, *places.tensors),
        *(*key.stride(), *value.stride(), tokens, places.capacity),
        WINDOWED=storage.window != 0,
        HEADS=heads,
        KEYS=BlockFormat.parts(storage.key, key_dim, itemsize),
        KEY_WRITERS=BlockWriter.parts(storage.key, Axis.TOKENS, key_dim),
        VALUES=BlockFormat.parts(storage.value, value_dim, itemsize),
        VALUE_WRITERS=BlockWriter.parts(storage.value, Axis.CHANNELS, value_dim),
        RECENT=storage.recent,
        **places.arguments,
        **places.widths,
        num_warps=4,
        # A product and a sum must be rounded one after the other, as PyTorch does.
        enable_fp_fusion=False,
    )
