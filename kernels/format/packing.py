"""The bytes of a packed block: 32 tokens of one head, self-contained.

    [ codes | scales and zero points ]

A group's elements are stored as ``element ~ code * scale + zero_point`` with codes from 0 to 2**bits - 1.

Codes are packed along channels, in planes of 1, 2, 4 or 8 bits that follow each other; 3 bits are a plane of the low
two and a plane of the high one. A plane of width w is ``[32 tokens, P = head_dim * w / 8 bytes]``, and byte (token, p)
holds channels p, p + P, p + 2P ... from its lowest bits up. One shift and one mask thus yield P neighbouring channels.

Groups are ordered as their elements are: keys ``[32 / group, head_dim]``, values ``[32, head_dim / group]``.

16-bit scales: all scales, then all zero points, in float16.
4-bit scales: four float16 numbers (lowest and highest log2 scale, lowest and highest zero point of the block), then one
byte a group: the low nibble places its log2 scale, the high nibble its zero point, linearly between those extremes.

A block of 16-bit precision is the elements' own bytes, ``[32, head_dim]``.

Where important channels have more bits, a block is several such blocks of fewer channels, one behind the other: those
of Precision.parts, halves or tiers of the channels. Each is self-contained as above.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import BLOCK_EXTREMES_BYTES, BLOCK_TOKENS, Axis, Precision

FLOAT16_MAX = torch.finfo(torch.float16).max

# The widths of the planes a code is cut into, low bits first.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}

NIBBLE_LEVELS = 15

# A group whose elements hardly differ must not stretch the range of its block's 4-bit log2 scales: 2**-8 of the block's
# coarsest scale is finer than anything that matters beside it.
LOG2_SCALE_RANGE = 8.0

# The scale of a group whose elements are all equal: float16's smallest number.
SMALLEST_SCALE = 2.0**-24

# What is added to the place of a zero point and of a log2 scale, in steps, before it is rounded to its nibble. Scales
# rounded down clip a few elements at the ends, which pays while codes are coarse and costs once they are fine; at many
# bits zero points are rounded down and scales up. Less than half a step, so that a block's extremes stay as they are.
NIBBLE_BIAS = {1: (0.0, -0.2), 2: (0.0, -0.2), 3: (0.0, -0.25), 4: (-0.25, 0.0), 8: (-0.45, 0.45)}

# Where a group's scales have 4 bits: how far from its middle its lowest and highest level lie, in standard deviations
# of normally distributed elements. Codes of more bits span the whole range. Few levels that reach to both ends are far
# from where most elements are: the ends of 32 lie at 2.07, where two levels have an error of twice the variance; at
# 1.25 it is 0.57 of it. That is where two levels neither shrink nor stretch what they stand for. The least error, 0.36
# at 0.8, shrinks all elements alike, which attention does not average away as it does random errors. Values are
# rotated, and normal enough; keys have longer tails. docs/method.md has figures. 16-bit scales are KIVI's and KVmix's.
REACH = {Axis.TOKENS: {1: 1.35, 2: 1.92}, Axis.CHANNELS: {1: 1.15, 2: 1.9, 3: 2.2}}


def kept_range(precision: Precision, axis: Axis) -> float:
    """The share of the range of its elements that a group's levels span, from the middle; 1 where it is all of it."""
    reach = REACH[axis].get(precision.bits)
    if reach is None or precision.scale_bits != 4 or precision.group == 1:
        return 1.0
    # The expected largest of so many normally distributed numbers (Blom, 1958).
    largest = NormalDist().inv_cdf((precision.group - 0.375) / (precision.group + 0.25))
    return min(1.0, reach / largest)


def quantize_block(elements: Tensor, precision: Precision, axis: Axis) -> Tensor:
    """Packs blocks of 32 tokens.

    elements: [..., 32, head_dim], any floating dtype, finite. Magnitudes beyond float16's are clamped to its largest.
    Returns uint8 [..., precision.block_bytes(head_dim, itemsize)], contiguous.
    Raises KVMixError where precision and shape do not go together.
    """
    tokens, head_dim = elements.shape[-2:]
    if tokens != BLOCK_TOKENS:
        raise KVMixError(f"a block has {BLOCK_TOKENS} tokens, not {tokens}")
    precision.check(head_dim, axis)
    if not precision.is_quantized:
        return elements.contiguous().flatten(-2).view(torch.uint8)
    if precision.important_bits:
        parts = precision.parts(head_dim)
        pieces = elements.split([part.channels for part in parts], dim=-1)
        packed = [quantize_block(piece, part.precision, axis) for piece, part in zip(pieces, parts, strict=True)]
        return torch.cat(packed, dim=-1)
    grouped = _by_group(elements.float().clamp(-FLOAT16_MAX, FLOAT16_MAX), precision, axis)
    within_group = -2 if axis == Axis.TOKENS else -1
    lowest = grouped.amin(within_group).flatten(-2)
    highest = grouped.amax(within_group).flatten(-2)
    if precision.scale_bits == 4:
        metadata = _nibble_metadata(*_narrowed(lowest, highest, kept_range(precision, axis)), precision)
    else:
        metadata = _float16_metadata(lowest, highest, precision)
    # Codes answer to the scales and zero points as a reader will find them.
    scale, zero_point = _read_metadata(metadata, precision, axis, head_dim)
    step = scale.masked_fill(scale == 0, torch.inf)
    codes = ((grouped - zero_point) / step).round_().clamp_(0, precision.levels).to(torch.uint8)
    return torch.cat([_pack_codes(codes.view(elements.shape), precision.bits), metadata], dim=-1)


def dequantize_block(packed: Tensor, precision: Precision, axis: Axis, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The inverse of quantize_block, up to rounding.

    packed: uint8 [..., block_bytes], its last dimension contiguous.
    Returns dtype [..., 32, head_dim], see dequantize_into.
    """
    elements = packed.new_empty(*packed.shape[:-1], BLOCK_TOKENS, head_dim, dtype=dtype)
    dequantize_into(elements, packed, precision, axis)
    return elements


def dequantize_into(elements: Tensor, packed: Tensor, precision: Precision, axis: Axis) -> None:
    """Writes ``code * scale + zero_point``, computed in float32 and rounded to the dtype of elements; always finite.

    Each element is within half a step of the original clamped to the range its group's stored numbers span.
    elements: [..., 32, head_dim], any floating dtype and strides; packed: uint8 [..., block_bytes], its last dimension
    contiguous.
    """
    head_dim = elements.shape[-1]
    if not precision.is_quantized:
        elements.copy_(packed.view(elements.dtype).unflatten(-1, (BLOCK_TOKENS, head_dim)))
        return
    if precision.important_bits:
        parts = precision.parts(head_dim)
        pieces = elements.split([part.channels for part in parts], dim=-1)
        sizes = [part.precision.block_bytes(part.channels, elements.itemsize) for part in parts]
        for piece, packed_piece, part in zip(pieces, packed.split(sizes, dim=-1), parts, strict=True):
            dequantize_into(piece, packed_piece, part.precision, axis)
        return
    in_place = elements.dtype == torch.float32
    computed = elements if in_place else torch.empty_like(elements, dtype=torch.float32)
    code_bytes = precision.code_bytes(head_dim)
    scale, zero_point = _read_metadata(packed[..., code_bytes:], precision, axis, head_dim)
    _unpack_codes(computed, packed[..., :code_bytes], precision.bits)
    _by_group(computed, precision, axis).mul_(scale).add_(zero_point)
    if elements.dtype == torch.float16:
        computed.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    if not in_place:
        elements.copy_(computed)


def _by_group(elements: Tensor, precision: Precision, axis: Axis) -> Tensor:
    """[..., 32, head_dim] seen as [..., 32 / group, group, head_dim] (tokens) or [..., 32, head_dim / group, group]."""
    return elements.unflatten(-2 if axis == Axis.TOKENS else -1, (-1, precision.group))


def _narrowed(lowest: Tensor, highest: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The middle `share` of each range."""
    margin = (highest - lowest) * ((1 - share) / 2)
    return lowest + margin, highest - margin


def _float16_metadata(lowest: Tensor, highest: Tensor, precision: Precision) -> Tensor:
    zero_point = lowest.half()
    scale = ((highest - zero_point.float()) / precision.levels).clamp(0, FLOAT16_MAX).half()
    return torch.cat([scale, zero_point], dim=-1).view(torch.uint8)


def _nibble_metadata(lowest: Tensor, highest: Tensor, precision: Precision) -> Tensor:
    zero_point_bias, log2_scale_bias = NIBBLE_BIAS[precision.bits]
    zero_point_extremes = _extremes(lowest)
    zero_point_nibble = _to_nibble(lowest, zero_point_extremes, zero_point_bias)
    zero_point = _from_nibble(zero_point_nibble, zero_point_extremes)
    # The scale makes up for a zero point that was rounded: it reaches from the stored one to the group's highest.
    log2_scale = _precise(((highest - zero_point) / precision.levels).clamp_min(SMALLEST_SCALE)).log2().float()
    floor = log2_scale.amax(-1, keepdim=True) - LOG2_SCALE_RANGE
    log2_scale = log2_scale.maximum(floor)
    log2_scale_extremes = _extremes(log2_scale)
    log2_scale_nibble = _to_nibble(log2_scale, log2_scale_extremes, log2_scale_bias)
    extremes = torch.cat([log2_scale_extremes, zero_point_extremes], dim=-1).view(torch.uint8)
    return torch.cat([extremes, log2_scale_nibble | zero_point_nibble << 4], dim=-1)


def _read_metadata(metadata: Tensor, precision: Precision, axis: Axis, head_dim: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points in float32, shaped to broadcast over _by_group's view."""
    if precision.scale_bits == 4:
        extremes = metadata[..., :BLOCK_EXTREMES_BYTES].view(torch.float16)
        nibbles = metadata[..., BLOCK_EXTREMES_BYTES:]
        scale = _precise(_from_nibble(nibbles & NIBBLE_LEVELS, extremes[..., :2])).exp2().float()
        zero_point = _from_nibble(nibbles >> 4, extremes[..., 2:])
    else:
        scale, zero_point = metadata.view(torch.float16).float().chunk(2, dim=-1)
    shape = (-1, 1, head_dim) if axis == Axis.TOKENS else (BLOCK_TOKENS, -1, 1)
    return scale.unflatten(-1, shape), zero_point.unflatten(-1, shape)


def _precise(numbers: Tensor) -> Tensor:
    """In float64, whose logarithms and powers round to the same float32 whatever library computes them, so that packed
    bytes are the same on every device. Apple's GPUs have none.
    """
    return numbers if numbers.device.type == "mps" else numbers.double()


def _extremes(numbers: Tensor) -> Tensor:
    """[..., n] -> float16 [..., 2], the lowest and the highest."""
    return torch.stack([numbers.amin(-1), numbers.amax(-1)], dim=-1).half()


def _to_nibble(numbers: Tensor, extremes: Tensor, bias: float) -> Tensor:
    lowest, step = _nibble_scale(extremes)
    step = step.masked_fill(step == 0, torch.inf)
    return ((numbers - lowest) / step + bias).round_().clamp_(0, NIBBLE_LEVELS).to(torch.uint8)


def _from_nibble(nibbles: Tensor, extremes: Tensor) -> Tensor:
    lowest, step = _nibble_scale(extremes)
    return (nibbles * step).add_(lowest)


def _nibble_scale(extremes: Tensor) -> tuple[Tensor, Tensor]:
    lowest, highest = extremes.float().split(1, dim=-1)
    return lowest, (highest - lowest) / NIBBLE_LEVELS


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32, head_dim] -> uint8 [..., 32 * head_dim * bits / 8]."""
    planes, below = [], 0
    for width in PLANES[bits]:
        fields = ((codes >> below) & (2**width - 1)).unflatten(-1, (8 // width, -1)).unbind(-2)
        plane = fields[0].clone()
        for place, field in enumerate(fields[1:], start=1):
            plane |= field << place * width
        planes.append(plane.flatten(-2))
        below += width
    return torch.cat(planes, dim=-1)


def _unpack_codes(codes: Tensor, packed: Tensor, bits: int) -> None:
    """uint8 [..., 32 * head_dim * bits / 8] -> codes, float32 [..., 32, head_dim]."""
    begin, below = 0, 0
    for width in PLANES[bits]:
        end = begin + codes.shape[-2:].numel() * width // 8
        # Eight bytes at a time: blocks and planes are multiples of eight bytes.
        words = packed[..., begin:end].view(torch.int64)
        mask = -1 if width == 8 else (2**width - 1) * 0x0101010101010101
        for place, field in enumerate(codes.unflatten(-1, (8 // width, -1)).unbind(-2)):
            part = (words >> place * width & mask).view(torch.uint8).unflatten(-1, (BLOCK_TOKENS, -1))
            if below:
                field.add_(part, alpha=2**below)
            else:
                field.copy_(part)
        begin, below = end, below + width
