"""What Triton kernels share: a packed block's constants, and its elements in registers. The bytes: packing.py."""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from kvmix_compile.kernels.packing import PLANES
from kvmix_compile.kernels.precision import BLOCK_EXTREMES_BYTES, BLOCK_TOKENS, Part, Precision

# tl.dot wants at least this many channels.
SMALLEST_DOT = 16

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# NVIDIA's instructions can be written into a kernel.
_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
_TOKENS = tl.constexpr(BLOCK_TOKENS)
_EXTREMES_BYTES = tl.constexpr(BLOCK_EXTREMES_BYTES)
_NIBBLE_LEVELS = tl.constexpr(15.0)
_LOG_2 = tl.constexpr(0.6931471805599453)
_FLOAT16_MAX = tl.constexpr(65504.0)

# The bits of 2**23 in float32: a smaller integer in the mantissa's place makes the float 2**23 + integer. An or and a
# subtraction take half the time of the conversion instruction.
_EXPONENT_BITS = tl.constexpr(0x4B000000)
_EXPONENT_VALUE = tl.constexpr(8388608.0)

# What a byte is more by where it takes the second lowest place of a float32 whose highest byte is 0x47.
_BYTE_OFFSET = tl.constexpr(32768.0)


@dataclass(frozen=True)
class BlockFormat:
    """A packed block of one head, or a part of it that holds some of the channels, as the constants a kernel is
    compiled for.

    Byte p of a token's row of the lowest plane holds channels p, p + width, p + 2 * width .. in `slices` fields. Padded
    to a power of two a row of fields has `padded_width` places, and all of them `slices * padded_width`.
    channels, code_bytes: of the part; first_channel, first_byte: where in head and block it begins.
    head_dim, block_bytes: of the whole head and block.
    run: neighbouring channels that always share a value's scale, a power of two that divides slices and groups.
    """

    bits: int
    group: int
    scale_bits: int
    head_dim: int
    first_channel: int
    channels: int
    block_bytes: int
    first_byte: int
    code_bytes: int
    slices: int
    width: int
    padded_width: int
    run: int

    @classmethod
    def parts(cls, precision: Precision, head_dim: int, itemsize: int) -> tuple[BlockFormat, ...]:
        """Of each of Precision.parts.

        itemsize: bytes of an element of the model's dtype.
        """
        block_bytes = precision.block_bytes(head_dim, itemsize)
        formats: list[BlockFormat] = []
        first_byte = 0
        for part in precision.parts(head_dim):
            formats.append(cls._of(part, head_dim, block_bytes, first_byte))
            first_byte += part.precision.block_bytes(part.channels, itemsize)
        return tuple(formats)

    @classmethod
    def _of(cls, part: Part, head_dim: int, block_bytes: int, first_byte: int) -> BlockFormat:
        precision, channels = part.precision, part.channels
        slices = 8 // PLANES[precision.bits][0] if precision.is_quantized else 1
        width = channels // slices
        common = gcd(width, precision.group)
        return cls(
            bits=precision.bits,
            group=precision.group,
            scale_bits=precision.scale_bits,
            head_dim=head_dim,
            first_channel=part.first_channel,
            channels=channels,
            block_bytes=block_bytes,
            first_byte=first_byte,
            code_bytes=precision.code_bytes(channels) if precision.is_quantized else 0,
            slices=slices,
            width=width,
            padded_width=max(triton.next_power_of_2(width), SMALLEST_DOT // slices),
            run=common & -common,
        )


@triton.constexpr_function
def part_of(constants, part):
    """constants[part], which Triton 3.6 would not take for a constant where it is handed to a function."""
    return constants[part]


@triton.jit
def channels_in_order(FORMAT: tl.constexpr):
    """The head's channel at each place of an unpacked row, and whether it is one: int32 and bool [places]."""
    place = tl.arange(0, FORMAT.slices * FORMAT.padded_width)
    within = place % FORMAT.padded_width
    channel = FORMAT.first_channel + place // FORMAT.padded_width * FORMAT.width + within
    return channel, within < FORMAT.width


@triton.jit
def unpack_keys(blocks, first, end, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, FORMAT: tl.constexpr):
    """A part of the keys of blocks first to first + BLOCKS - 1, zero from block `end` on: [BLOCKS * 32, places].

    blocks: pointer to the bytes of the head's block 0.
    """
    if FORMAT.bits == 16:
        return _load_elements(blocks, first, end, DTYPE, BLOCKS, FORMAT)
    blocks += FORMAT.first_byte
    PER_BLOCK: tl.constexpr = _TOKENS // FORMAT.group
    GROUPS: tl.constexpr = BLOCKS * PER_BLOCK
    group = tl.arange(0, GROUPS)
    block = first + group // PER_BLOCK
    metadata = (blocks + FORMAT.code_bytes + block * FORMAT.block_bytes)[:, None, None]
    slice_ = tl.arange(0, FORMAT.slices)[None, :, None]
    within = tl.arange(0, FORMAT.padded_width)[None, None, :]
    index = (group % PER_BLOCK * FORMAT.channels)[:, None, None] + slice_ * FORMAT.width + within
    is_block = (block < end)[:, None, None]
    scale, zero_point = load_metadata(metadata, index, is_block, within < FORMAT.width, FORMAT, EXACT=False)
    codes = _load_codes(blocks, first, end, DTYPE, BLOCKS, FORMAT)
    codes = codes.reshape(GROUPS, FORMAT.group, FORMAT.slices, FORMAT.padded_width)
    scale, zero_point = _of_codes(scale, zero_point, slice_, DTYPE, FORMAT)
    elements = codes * scale[:, None, :, :] + zero_point[:, None, :, :]
    return _rounded(elements, DTYPE).reshape(BLOCKS * _TOKENS, FORMAT.slices * FORMAT.padded_width)


@triton.jit
def unpack_values(blocks, first, end, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, FORMAT: tl.constexpr):
    """As unpack_keys; values have all their channels in one part."""
    if FORMAT.bits == 16:
        return _load_elements(blocks, first, end, DTYPE, BLOCKS, FORMAT)
    PER_TOKEN: tl.constexpr = FORMAT.head_dim // FORMAT.group
    RUNS: tl.constexpr = FORMAT.padded_width // FORMAT.run
    token = tl.arange(0, BLOCKS * _TOKENS)
    block = first + token // _TOKENS
    metadata = (blocks + FORMAT.code_bytes + block * FORMAT.block_bytes)[:, None, None]
    slice_ = tl.arange(0, FORMAT.slices)[None, :, None]
    within = tl.arange(0, RUNS)[None, None, :] * FORMAT.run
    index = (token % _TOKENS * PER_TOKEN)[:, None, None] + (slice_ * FORMAT.width + within) // FORMAT.group
    is_block = (block < end)[:, None, None]
    scale, zero_point = load_metadata(metadata, index, is_block, within < FORMAT.width, FORMAT, EXACT=False)
    codes = _load_codes(blocks, first, end, DTYPE, BLOCKS, FORMAT)
    codes = codes.reshape(BLOCKS * _TOKENS, FORMAT.slices, RUNS, FORMAT.run)
    scale, zero_point = _of_codes(scale, zero_point, slice_, DTYPE, FORMAT)
    elements = codes * scale[:, :, :, None] + zero_point[:, :, :, None]
    return _rounded(elements, DTYPE).reshape(BLOCKS * _TOKENS, FORMAT.slices * FORMAT.padded_width)


@triton.jit
def _load_elements(blocks, first, end, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, FORMAT: tl.constexpr):
    token = tl.arange(0, BLOCKS * _TOKENS)
    channel, is_channel = channels_in_order(FORMAT)
    elements = blocks.to(tl.pointer_type(DTYPE)) + first * (_TOKENS * FORMAT.head_dim)
    mask = (first + token // _TOKENS < end)[:, None] & is_channel[None, :]
    return tl.load(elements + token[:, None] * FORMAT.head_dim + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load_codes(blocks, first, end, DTYPE: tl.constexpr, BLOCKS: tl.constexpr, FORMAT: tl.constexpr):
    """Codes, each times the place value of its field's lowest bit: float32 [BLOCKS * 32, slices, padded_width]. More by
    _BYTE_OFFSET where _by_permutation.
    """
    token = tl.arange(0, BLOCKS * _TOKENS)
    within = tl.arange(0, FORMAT.padded_width)
    block = first + token // _TOKENS
    mask = (block < end)[:, None, None] & (within < FORMAT.width)[None, None, :]
    rows = blocks + block * FORMAT.block_bytes + token % _TOKENS * FORMAT.width
    low = tl.load(rows[:, None, None] + within[None, None, :], mask=mask, other=0)
    shift = _field_shift(tl.arange(0, FORMAT.slices), FORMAT)[None, :, None]
    if _by_permutation(FORMAT, DTYPE):
        return _permuted(*tl.broadcast(low, ((2**FORMAT.bits - 1) << shift).to(tl.uint8)))
    low = low.to(tl.int32)
    if FORMAT.bits == 3:
        HALF: tl.constexpr = FORMAT.width // 2
        plane = blocks + _TOKENS * FORMAT.width
        rows = plane + block * FORMAT.block_bytes + token % _TOKENS * HALF
        # Fields 2 i and 2 i + 1 of the high plane are the two halves of field i of the low one.
        high = tl.load(rows[:, None, None] + (within % HALF)[None, None, :], mask=mask, other=0).to(tl.int32)
        high = (high >> (within // HALF)[None, None, :]) << 2
        fields = (low & (3 << shift)) | (high & (4 << shift))
    else:
        fields = low & ((2**FORMAT.bits - 1) << shift)
    return _to_float(fields)


@triton.jit
def _to_float(integer):
    """Of integers from 0 to 2**23 - 1."""
    return (integer | _EXPONENT_BITS).to(tl.float32, bitcast=True) - _EXPONENT_VALUE


@triton.jit
def _field_shift(slice_, FORMAT: tl.constexpr):
    return slice_ * (8 // FORMAT.slices)


@triton.constexpr_function
def _by_permutation(format, dtype):
    """Whether codes become floats four at a time. Their offset makes zero points inexact by 0.002 steps, which is too
    much for float32 alone; codes of 3 bits lie in two planes.
    """
    return _HAS_PTX.value and format.bits != 3 and dtype != tl.float32


@triton.jit
def _permuted(bytes, fields):
    """_BYTE_OFFSET + (bytes & fields), of uint8: a mask for four bytes, and an instruction for each.

    It claims side effects, as _once does, and for the second of its reasons.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 masked;
        and.b32 masked, $4, $5;
        prmt.b32 $0, masked, 0x47, 0x4505;
        prmt.b32 $1, masked, 0x47, 0x4515;
        prmt.b32 $2, masked, 0x47, 0x4525;
        prmt.b32 $3, masked, 0x47, 0x4535;
        }""",
        "=f,=f,=f,=f,r,r",
        [bytes, fields],
        dtype=tl.float32,
        is_pure=False,
        pack=4,
    )


@triton.jit
def _of_codes(scale, zero_point, slice_, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The scales and zero points of codes as _load_codes leaves them. Powers of two take nothing from a scale."""
    scale *= ((127 - _field_shift(slice_, FORMAT)) << 23).to(tl.float32, bitcast=True)
    if _by_permutation(FORMAT, DTYPE):
        zero_point -= _BYTE_OFFSET * scale
    return _once(scale), _once(zero_point)


@triton.jit
def _once(x):
    """x, worked out once, and then broadcast.

    The compiler, to save moving a small tensor between threads, would rather have every thread work out all that it
    needs of it: for the zero points of keys half of the loop's instructions. It does not repeat what has side effects.
    And it looks back from a product to the bytes that the operands were made of, to hold them in the order in which
    bytes are multiplied, which takes another move for each element; it does not look past side effects either.
    """
    if not _HAS_PTX:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def load_metadata(metadata, index, is_block, is_channel, FORMAT: tl.constexpr, EXACT: tl.constexpr):
    """Scales and zero points, float32, finite also where is_block or is_channel is false.

    metadata: pointers to the first byte behind the codes of a block.
    EXACT: as packing.py computes them, to the last bit; else faster.
    """
    halves = metadata.to(tl.pointer_type(tl.float16))
    mask = is_block & is_channel
    if FORMAT.scale_bits == 16:
        GROUPS: tl.constexpr = _TOKENS * FORMAT.channels // FORMAT.group
        scale = tl.load(halves + index, mask=mask, other=0.0).to(tl.float32)
        zero_point = tl.load(halves + GROUPS + index, mask=mask, other=0.0).to(tl.float32)
    else:
        nibbles = tl.load(metadata + _EXTREMES_BYTES + index, mask=mask, other=0).to(tl.int32)
        log2_scale = _from_nibble(halves, nibbles & 15, is_block, EXACT)
        scale = exact_exp(log2_scale * _LOG_2) if EXACT else tl.exp2(log2_scale)
        zero_point = _from_nibble(halves + 2, nibbles >> 4, is_block, EXACT)
    return scale, zero_point


@triton.jit
def _from_nibble(extremes, nibble, mask, EXACT: tl.constexpr):
    """extremes: pointers to the lowest number, with the highest behind it."""
    lowest = tl.load(extremes, mask=mask, other=0.0).to(tl.float32)
    highest = tl.load(extremes + 1, mask=mask, other=0.0).to(tl.float32)
    step = nibble_step(lowest, highest) if EXACT else (highest - lowest) * (1.0 / _NIBBLE_LEVELS)
    return _to_float(nibble) * step + lowest


@triton.jit
def nibble_step(lowest, highest):
    """What one of a nibble's levels is worth between these extremes, correctly rounded."""
    extent = highest - lowest
    return tl.div_rn(extent, tl.full(extent.shape, _NIBBLE_LEVELS, tl.float32))


@triton.jit
def exact_exp(x):
    """As PyTorch computes it on the device: tl.exp is an approximation there."""
    return tl.exp(x) if _INTERPRETED else libdevice.exp(x)


@triton.jit
def exact_log2(x):
    """As exact_exp."""
    return tl.log2(x) if _INTERPRETED else libdevice.log2(x)


@triton.jit
def _rounded(elements, DTYPE: tl.constexpr):
    """Only upwards can an element leave float16's range: no zero point does, and scales are not negative."""
    if DTYPE.is_fp16():
        elements = tl.minimum(elements, _FLOAT16_MAX)
    return elements.to(DTYPE)
