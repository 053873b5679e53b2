"""What Triton kernels share: a packed block's constants, and its elements in registers. The bytes: packing.py."""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"
# Behind a return Triton compiles what is not in an else.
# ruff: noqa: RET505

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from kvmix_compile.kernels.format.packing import PLANES
from kvmix_compile.kernels.format.precision import BLOCK_EXTREMES_BYTES, BLOCK_TOKENS, Part, Precision
from kvmix_compile.kernels.gpu.pages import BLOCK_ALIGNMENT

# Where the mask $2 is not set, a byte's higher bits take the lower ones' places: $1 & $2 | $1 >> 1 & ~$2.
HALVED = tl.constexpr("{ .reg .b32 higher; shr.u32 higher, $1, 1; lop3.b32 $0, $1, higher, $2, 0xE4; }")

# tl.dot wants at least this many channels.
SMALLEST_DOT = 16

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# NVIDIA's instructions can be written into a kernel.
_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
_TOKENS = tl.constexpr(BLOCK_TOKENS)
_EXTREMES_BYTES = tl.constexpr(BLOCK_EXTREMES_BYTES)
_BLOCK_ALIGNMENT = tl.constexpr(BLOCK_ALIGNMENT)
_NIBBLE_LEVELS = tl.constexpr(15.0)
_FLOAT16_MAX = tl.constexpr(65504.0)

# The bits of 2**23 in float32: a smaller integer in the mantissa's place makes the float 2**23 + integer. An or and a
# subtraction take half the time of the conversion instruction.
_EXPONENT_BITS = tl.constexpr(0x4B000000)
_EXPONENT_VALUE = tl.constexpr(8388608.0)

# What a byte is more by where it takes the second lowest place of a float32 whose highest byte is 0x47.
_BYTE_OFFSET = tl.constexpr(32768.0)

# The high byte of 16-bit numbers in whose low byte an integer can be put, and what the number is more by: 128 for seven
# bits of bfloat16, 1024 for the whole byte of float16.
_HIGH_BYTE = {"bf16": 0x43, "fp16": 0x64}
_BFLOAT16_OFFSET = tl.constexpr(128.0)


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
def unpack_keys(
    blocks,
    places,
    first,
    end,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    THREADS: tl.constexpr,
    PAGED: tl.constexpr,
):
    """A part of the keys of blocks first to first + BLOCKS - 1, zero from block `end` on: [BLOCKS * 32, places].

    blocks: pointer to the bytes of the head's block 0, or to its first byte in the pool of pages.
    places: None where each block lies in its own place; how many there is room for where later ones may have taken the
    places of earlier ones; or, where they are PAGED, bytes to each of the BLOCKS (pages.py), which are two at most.
    THREADS: of a program.
    """
    if FORMAT.bits == 16:
        return _load_elements(blocks, places, first, end, DTYPE, BLOCKS, FORMAT, PAGED)
    blocks += FORMAT.first_byte
    PER_BLOCK: tl.constexpr = _TOKENS // FORMAT.group
    GROUPS: tl.constexpr = BLOCKS * PER_BLOCK
    group = tl.arange(0, GROUPS)
    block = first + group // PER_BLOCK
    offset = _offset_of(first, group // PER_BLOCK, places, FORMAT, PAGED)
    metadata = (blocks + FORMAT.code_bytes + offset)[:, None, None]
    slice_ = tl.arange(0, FORMAT.slices)[None, :, None]
    within = tl.arange(0, FORMAT.padded_width)[None, None, :]
    index = (group % PER_BLOCK * FORMAT.channels)[:, None, None] + slice_ * FORMAT.width + within
    is_block = (block < end)[:, None, None]
    scale, zero_point = load_metadata(metadata, index, is_block, within < FORMAT.width, FORMAT, THREADS, EXACT=False)
    scale, zero_point = _of_codes(scale, zero_point, DTYPE, FORMAT)
    low, high = _load_planes(blocks, places, first, end, BLOCKS, FORMAT, PAGED)
    SHAPE: tl.constexpr = (GROUPS, FORMAT.group, 1, FORMAT.padded_width)
    elements = _dequantized(
        low.reshape(SHAPE),
        high.reshape(SHAPE),
        scale[:, None, :, :],
        zero_point[:, None, :, :],
        slice_[:, None, :, :],
        DTYPE,
        FORMAT,
    )
    return elements.reshape(BLOCKS * _TOKENS, FORMAT.slices * FORMAT.padded_width)


@triton.jit
def unpack_values(
    blocks,
    places,
    first,
    end,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    THREADS: tl.constexpr,
    PAGED: tl.constexpr,
):
    """As unpack_keys; values have all their channels in one part."""
    if FORMAT.bits == 16:
        return _load_elements(blocks, places, first, end, DTYPE, BLOCKS, FORMAT, PAGED)
    PER_TOKEN: tl.constexpr = FORMAT.head_dim // FORMAT.group
    RUNS: tl.constexpr = FORMAT.padded_width // FORMAT.run
    token = tl.arange(0, BLOCKS * _TOKENS)
    block = first + token // _TOKENS
    offset = _offset_of(first, token // _TOKENS, places, FORMAT, PAGED)
    metadata = (blocks + FORMAT.code_bytes + offset)[:, None, None]
    slice_ = tl.arange(0, FORMAT.slices)[None, :, None]
    within = tl.arange(0, RUNS)[None, None, :] * FORMAT.run
    index = (token % _TOKENS * PER_TOKEN)[:, None, None] + (slice_ * FORMAT.width + within) // FORMAT.group
    is_block = (block < end)[:, None, None]
    scale, zero_point = load_metadata(metadata, index, is_block, within < FORMAT.width, FORMAT, THREADS, EXACT=False)
    scale, zero_point = _of_codes(scale, zero_point, DTYPE, FORMAT)
    low, high = _load_planes(blocks, places, first, end, BLOCKS, FORMAT, PAGED)
    SHAPE: tl.constexpr = (BLOCKS * _TOKENS, 1, RUNS, FORMAT.run)
    elements = _dequantized(
        low.reshape(SHAPE),
        high.reshape(SHAPE),
        scale[:, :, :, None],
        zero_point[:, :, :, None],
        slice_[:, :, :, None],
        DTYPE,
        FORMAT,
    )
    return elements.reshape(BLOCKS * _TOKENS, FORMAT.slices * FORMAT.padded_width)


@triton.jit
def _slot_of(first, offset, capacity):
    """Where block first + offset lies, for an offset up to `capacity`, which is as unpack_keys takes it."""
    if capacity is None:
        return first + offset
    else:
        slot = first % capacity + offset
        return tl.where(slot < capacity, slot, slot - capacity)


@triton.jit
def _offset_of(first, offset, places, FORMAT: tl.constexpr, PAGED: tl.constexpr):
    """Bytes to where block first + offset lies. The rest: unpack_keys."""
    if PAGED:
        return tl.where(offset == 0, places[0], places[len(places) - 1])
    else:
        return _slot_of(first, offset, places) * FORMAT.block_bytes


@triton.jit
def _load_elements(
    blocks,
    places,
    first,
    end,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    PAGED: tl.constexpr,
):
    token = tl.arange(0, BLOCKS * _TOKENS)
    channel, is_channel = channels_in_order(FORMAT)
    mask = (first + token // _TOKENS < end)[:, None] & is_channel[None, :]
    if PAGED:
        offset = _offset_of(first, token // _TOKENS, places, FORMAT, PAGED)
        of_block = (blocks + offset).to(tl.pointer_type(DTYPE))
        elements = (of_block + token % _TOKENS * FORMAT.head_dim)[:, None]
    else:
        row = _slot_of(first, token // _TOKENS, places) * _TOKENS + token % _TOKENS
        elements = blocks.to(tl.pointer_type(DTYPE)) + (row * FORMAT.head_dim)[:, None]
    return tl.load(elements + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load_planes(blocks, places, first, end, BLOCKS: tl.constexpr, FORMAT: tl.constexpr, PAGED: tl.constexpr):
    """The bytes of the lowest plane, and for 3 bits those of the high one: uint8 [BLOCKS * 32, padded_width] each.

    Bit 2 * i of a high byte belongs to the code in field i of the low one.
    """
    token = tl.arange(0, BLOCKS * _TOKENS)
    within = tl.arange(0, FORMAT.padded_width)
    mask = (first + token // _TOKENS < end)[:, None] & (within < FORMAT.width)[None, :]
    offset = _offset_of(first, token // _TOKENS, places, FORMAT, PAGED)
    rows = blocks + offset + token % _TOKENS * FORMAT.width
    pointers = rows[:, None] + within[None, :]
    if _one_thread_would_load(FORMAT.padded_width):
        pointers = tl.max_contiguous(pointers, [1, FORMAT.padded_width // 2])
    if PAGED:
        # Of strides that are no constants the compiler does not know how rows are aligned.
        pointers = tl.multiple_of(pointers, [1, _row_alignment(FORMAT.width)])
    low = tl.load(pointers, mask=mask, other=0)
    if FORMAT.bits != 3:
        return low, low
    # Fields 2 i and 2 i + 1 of the high plane are the two halves of field i of the low one.
    HALF: tl.constexpr = FORMAT.width // 2
    rows = blocks + _TOKENS * FORMAT.width + offset + token % _TOKENS * HALF
    high = tl.load(rows[:, None] + (within % HALF)[None, :], mask=mask, other=0)
    return low, _halved(high, within // HALF)


@triton.constexpr_function
def _row_alignment(width):
    """Of rows of so many bytes, in blocks of pages."""
    return min(width & -width, _BLOCK_ALIGNMENT.value)


@triton.constexpr_function
def _one_thread_would_load(width):
    """Whether a thread can load a row of so many bytes at once, and two can do so too.

    Where one does, Triton takes the tokens for what lies side by side, and stores elements one by one on their way to
    the tensor cores. Two load four bytes or eight each, which still is enough to read ahead.
    """
    return width in (8, 16)


@triton.jit
def _halved(high, half):
    """Of every two neighbouring bits of a byte the lower one where half is 0, the higher one where it is 1, both in the
    lower one's place; what is left in the other's place means nothing.
    """
    if not _HAS_PTX:
        return high >> half.to(tl.uint8)[None, :]
    else:
        mask = tl.where(half == 0, 0xFF, 0).to(tl.uint8)[None, :]
        return tl.inline_asm_elementwise(
            HALVED, "=r,r,r", [high, mask], dtype=tl.uint8, is_pure=True, pack=4
        )  # fmt: skip


@triton.jit
def _dequantized(low, high, scale, zero_point, slice_, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """low, high: bytes of the planes; scale, zero_point: as _of_codes leaves them; of shapes that broadcast."""
    if _by_pairs(FORMAT, DTYPE):
        # It claims side effects, as _once does, and for the second of its reasons.
        return tl.inline_asm_elementwise(
            pairs_assembly(FORMAT.bits, DTYPE),
            "=r,=r,r,r,r,r,r,r,r,r,r,r",
            [low, high, _field_rotation(slice_, FORMAT, DTYPE), scale, zero_point],
            dtype=scale.dtype,
            is_pure=False,
            pack=4,
        )
    else:
        if _by_permutation(FORMAT, DTYPE):
            codes = _permuted(low)
        else:
            shift = _field_shift(slice_, FORMAT)
            fields = (low.to(tl.int32) >> shift) & (2 ** (8 // FORMAT.slices) - 1)
            if FORMAT.bits == 3:
                fields |= ((high.to(tl.int32) >> shift) & 1) << 2
            codes = small_to_float(fields)
        return _rounded(codes * scale + zero_point, DTYPE)


@triton.jit
def small_to_float(integer):
    """Of integers from 0 to 2**23 - 1."""
    return (integer | _EXPONENT_BITS).to(tl.float32, bitcast=True) - _EXPONENT_VALUE


@triton.jit
def _field_shift(slice_, FORMAT: tl.constexpr):
    return slice_ * (8 // FORMAT.slices)


@triton.jit
def _field_rotation(slice_, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Bits by which four bytes are rotated to the left, so that a field comes to lie where pairs_assembly wants it."""
    return (field_place(FORMAT.bits, DTYPE) + 32 - _field_shift(slice_, FORMAT)) % 32


@triton.constexpr_function
def _by_pairs(format, dtype):
    """Whether two codes at a time become elements in 16-bit arithmetic. Eight bits have no place in bfloat16."""
    return _HAS_PTX.value and (dtype == tl.float16 or (dtype == tl.bfloat16 and format.bits < 8))


@triton.constexpr_function
def _by_permutation(format, dtype):
    """Whether codes become float32 four at a time. Their offset makes zero points inexact by 0.002 steps, which is too
    much for float32 alone.
    """
    return _HAS_PTX.value and format.bits == 8 and dtype == tl.bfloat16


@triton.constexpr_function
def field_place(bits, dtype):
    """The bit of a byte at which pairs_assembly wants a code to begin: for bfloat16 as high as there is room."""
    return 7 - bits if dtype == tl.bfloat16 else 0


@triton.constexpr_function
def pairs_assembly(bits, dtype):
    """PTX that makes four elements, $0 and $1, of bytes of the planes, $2 and $3, rotations, $4 to $7, scales, $8 and
    $9, and zero points, $10 and $11.

    The four lie in a slice or in several, as the compiler deals them out to threads, so each has a rotation; where
    these are one register the assembler rotates once.

    Bytes become the low bytes of 16-bit numbers. float16's are freed of their offset. bfloat16's are not: with the code
    as high as possible it is 2**bits steps, which lose in the zero point no more than the element's own rounding does.
    """
    place, name = field_place(bits, dtype), dtype.name
    kind = "f16x2" if name == "fp16" else "bf16x2"
    fields, high_fields = (2 ** (2 if bits == 3 else bits) - 1) << place, 4 << place
    lines = []
    # Of each half two bytes are wanted; the other two hold the high bytes of the numbers.
    for half, wanted, others, chosen in ((0, 0x0101, 0x01010000, 0x6520), (1, 0x01010000, 0x0101, 0x4702)):
        for target, element in (("first", 2 * half), ("second", 2 * half + 1)):
            lines += [
                f"shf.l.wrap.b32 {target}, $2, $2, ${4 + element};",
                # 0xEA: (a & b) | c
                f"lop3.b32 {target}, {target}, {fields * wanted:#x}, {_HIGH_BYTE[name] * others:#x}, 0xEA;",
            ]
            if bits == 3:
                lines += [
                    f"add.u32 turn, ${4 + element}, 2;",
                    "shf.l.wrap.b32 high, $3, $3, turn;",
                    f"lop3.b32 {target}, high, {high_fields * wanted:#x}, {target}, 0xEA;",
                ]
        lines.append(f"prmt.b32 pair, first, second, {chosen:#x};")
        if name == "fp16":
            lines += ["mov.b32 constant, 0x64006400;", "sub.rn.f16x2 pair, pair, constant;"]
        lines.append(f"fma.rn.{kind} ${half}, pair, ${8 + half}, ${10 + half};")
        if name == "fp16":
            # As in _rounded: twice the largest number that there is.
            lines += ["mov.b32 constant, 0x7BFF7BFF;", f"min.f16x2 ${half}, ${half}, constant;"]
    return "{ .reg .b32 first, second, turn, high, pair, constant; " + " ".join(lines) + " }"


@triton.jit
def _permuted(bytes):
    """_BYTE_OFFSET + bytes, of uint8: an instruction for each. It claims side effects for _once's second reason."""
    return tl.inline_asm_elementwise(
        """{
        prmt.b32 $0, $4, 0x47, 0x4505;
        prmt.b32 $1, $4, 0x47, 0x4515;
        prmt.b32 $2, $4, 0x47, 0x4525;
        prmt.b32 $3, $4, 0x47, 0x4535;
        }""",
        "=f,=f,=f,=f,r",
        [bytes],
        dtype=tl.float32,
        is_pure=False,
        pack=4,
    )


@triton.jit
def _of_codes(scale, zero_point, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The scales and zero points that _dequantized wants, in float32 or, for pairs, in the elements' dtype."""
    if _by_pairs(FORMAT, DTYPE):
        if DTYPE.is_bf16():
            # A power of two takes nothing from a scale. The offset is that of the scale as it is rounded.
            scale = (scale * (1.0 / 2 ** field_place(FORMAT.bits, DTYPE))).to(DTYPE)
            zero_point -= _BFLOAT16_OFFSET * scale.to(tl.float32)
        return once(scale.to(DTYPE)), once(zero_point.to(DTYPE))
    else:
        if _by_permutation(FORMAT, DTYPE):
            zero_point -= _BYTE_OFFSET * scale
        return once(scale), once(zero_point)


@triton.jit
def once(x):
    """x, worked out once, and then broadcast.

    The compiler, to save moving a small tensor between threads, would rather have every thread work out all that it
    needs of it: for the scales and zero points more than half of the loop's instructions. Triton 3.7 does not repeat
    what has side effects. Triton 3.6 does, but not across a load of many bytes, unless on the way it finds one
    conversion to a larger type where it can move these bytes instead: to_integers and to_float32 hide it.
    And it looks back from a product to the bytes that the operands were made of, to hold them in the order in which
    bytes are multiplied, which takes another move for each element; it does not look past side effects either.
    """
    if not _HAS_PTX:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def load_metadata(
    metadata, index, is_block, is_channel, FORMAT: tl.constexpr, THREADS: tl.constexpr, EXACT: tl.constexpr
):
    """Scales and zero points, float32, finite also where is_block or is_channel is false.

    metadata: pointers to the first byte behind the codes of a block. THREADS: as load_once takes it.
    EXACT: as packing.py computes them, to the last bit; else faster.
    """
    halves = metadata.to(tl.pointer_type(tl.float16))
    mask = is_block & is_channel
    if FORMAT.scale_bits == 16:
        GROUPS: tl.constexpr = _TOKENS * FORMAT.channels // FORMAT.group
        scale = to_float32(load_once(halves + index, mask, THREADS))
        zero_point = to_float32(load_once(halves + GROUPS + index, mask, THREADS))
    else:
        nibbles = to_integers(load_once(metadata + _EXTREMES_BYTES + index, mask, THREADS))
        log2_scale = _from_nibble(halves, nibbles & 15, is_block, EXACT)
        scale = exact_exp2(log2_scale) if EXACT else tl.exp2(log2_scale)
        zero_point = _from_nibble(halves + 2, nibbles >> 4, is_block, EXACT)
    return scale, zero_point


@triton.constexpr_function
def _copies(elements, threads):
    """How often load_once loads each of so many elements: as many in all as there are threads."""
    return max(1, threads // elements)


@triton.jit
def load_once(pointers, mask, THREADS: tl.constexpr):
    """tl.load of [groups, slices, places], zero where the mask is false.

    A tensor with fewer elements than a program has threads Triton takes for cheap to load, and everything that is
    worked out of it for cheap to work out again in every thread that needs it. Copies of each element, of which all but
    one are masked out, make it as expensive as it is. THREADS: of a program; 1 where that does not matter.
    """
    COPIES: tl.constexpr = _copies(pointers.numel, THREADS)
    if COPIES == 1:
        return tl.load(pointers, mask=mask, other=0)
    else:
        copy = tl.arange(0, COPIES)[None, None, None, :]
        pointers, mask = tl.broadcast(pointers[:, :, :, None], (mask[:, :, :, None] & (copy == 0)))
        return tl.sum(tl.load(pointers, mask=mask, other=0), 3, dtype=pointers.dtype.element_ty)


@triton.jit
def to_integers(bytes):
    """Of uint8, int32."""
    if not _HAS_PTX:
        return bytes.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0, 0x4440;
            prmt.b32 $1, $4, 0, 0x4441;
            prmt.b32 $2, $4, 0, 0x4442;
            prmt.b32 $3, $4, 0, 0x4443;
            """,
            "=r,=r,=r,=r,r",
            [bytes],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )


@triton.jit
def to_float32(halves):
    """float16 as float32 by an instruction that Triton does not carry out twice."""
    if not _HAS_PTX:
        return halves.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "cvt.f32.f16 $0, $1;", "=f,h", [halves], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _from_nibble(extremes, nibble, mask, EXACT: tl.constexpr):
    """extremes: pointers to the lowest number, with the highest behind it."""
    lowest = tl.load(extremes, mask=mask, other=0.0).to(tl.float32)
    highest = tl.load(extremes + 1, mask=mask, other=0.0).to(tl.float32)
    step = nibble_step(lowest, highest) if EXACT else (highest - lowest) * (1.0 / _NIBBLE_LEVELS)
    return small_to_float(nibble) * step + lowest


@triton.jit
def nibble_step(lowest, highest):
    """What one of a nibble's levels is worth between these extremes, correctly rounded."""
    extent = highest - lowest
    return tl.div_rn(extent, tl.full(extent.shape, _NIBBLE_LEVELS, tl.float32))


@triton.jit
def exact_exp2(x):
    """As packing.py computes it, in float64; tl.exp2 is an approximation on the device."""
    wide = x.to(tl.float64)
    return (tl.exp2(wide) if _INTERPRETED else libdevice.exp2(wide)).to(tl.float32)


@triton.jit
def exact_log2(x):
    """As exact_exp2."""
    wide = x.to(tl.float64)
    return (tl.log2(wide) if _INTERPRETED else libdevice.log2(wide)).to(tl.float32)


@triton.jit
def _rounded(elements, DTYPE: tl.constexpr):
    """Only upwards can an element leave float16's range: no zero point does, and scales are not negative."""
    if DTYPE.is_fp16():
        elements = tl.minimum(elements, _FLOAT16_MAX)
    return elements.to(DTYPE)
