"""Where the codes of a packed block lie for a warp that multiplies them as they are: codes.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Part, Precision

# Threads of a warp. Of the second operand of mma.m16n8k16 four lie along what is summed, eight along what is not.
WARP, QUAD, OCTET = 32, 4, 8

# Elements along what one mma sums.
MMA_SUMMED = 16

# Channels of a piece of values: a word of bytes for each thread. Of keys, bytes of a stretch: two words, which is as
# many as blocks are aligned to.
WIDEST_PIECE = 4 * OCTET
WIDEST_STRETCH = 8 * QUAD

# Bits of a field of the lowest plane. Eight bits have no place in bfloat16's mantissa: they are two fields of the same
# channel.
_FIELD_BITS = {1: 1, 2: 2, 3: 2, 4: 4, 8: 4}


@dataclass(frozen=True)
class Rows:
    """A stretch of the bytes of every token's row in a block's lowest plane, as constants of a kernel.

    bits: of a code. first_byte: in the first token's row, from where the block begins; row_bytes: from row to row.
    width: bytes of the stretch, a power of two; present: how many of them there are.
    high_byte, high_shift: of 3 bits, where the same stretch begins in the high plane, and in which bit.
    first_channel: of the head, in the first byte's lowest field.
    metadata_byte: where scales and zero points begin; scale_bits: of each; first_group: that of first_channel;
    groups: of the part, to a group of tokens (keys), or to a token (values); all_groups: of the part in the block.
    """

    bits: int
    first_byte: int
    row_bytes: int
    width: int
    present: int
    high_byte: int
    high_shift: int
    first_channel: int
    metadata_byte: int
    scale_bits: int
    first_group: int
    groups: int
    all_groups: int

    @property
    def field_bits(self) -> int:
        """Of the lowest plane, or of one of two fields that make a code."""
        return _FIELD_BITS[self.bits]

    @property
    def slices(self) -> int:
        """Channels that have a field in the same byte."""
        return 1 if self.bits == 8 else 8 // self.field_bits


@cache
def rows_of_keys(precision: Precision, head_dim: int, itemsize: int) -> tuple[Rows, ...] | None:
    """All of a block of keys, or None where codes do not lie as they must."""
    if not precision.is_quantized or precision.group < OCTET:
        return None
    found: list[Rows] = []
    first_byte = 0
    for part in precision.parts(head_dim):
        for begin, width, present in _stretches(part):
            found.append(_rows(part, first_byte, begin, width, present, part.channels, begin))
        first_byte += part.precision.block_bytes(part.channels, itemsize)
    return tuple(found)


def _stretches(part: Part) -> Iterator[tuple[int, int, int]]:
    """Where each begins, its width, and how many bytes of it there are."""
    row_bytes, is_split = _row_bytes(part), part.precision.bits == 3
    smallest = max(QUAD, MMA_SUMMED * row_bytes // part.channels)
    # Words must be aligned.
    largest = WIDEST_STRETCH if row_bytes % 4 == 0 else 2 * QUAD
    begin = 0
    while begin < row_bytes:
        # Of 3 bits none reaches from one half of the lowest plane into the other.
        end = row_bytes // 2 if is_split and begin < row_bytes // 2 else row_bytes
        left = min(end - begin, largest)
        width = max(1 << left.bit_length() - 1, smallest)
        yield begin, width, min(width, left)
        begin += min(width, left)


@cache
def rows_of_values(precision: Precision, head_dim: int) -> tuple[Rows, ...] | None:
    """As rows_of_keys, cut so that each field of a stretch belongs to channels of one group."""
    if not precision.is_quantized or precision.bits == 8:
        return None
    (part,) = precision.parts(head_dim)
    row_bytes = _row_bytes(part)
    common = gcd(row_bytes // 2 if precision.bits == 3 else row_bytes, precision.group)
    width = min(common & -common, WIDEST_PIECE)
    if width < OCTET:
        return None
    groups = head_dim // precision.group
    return tuple(
        _rows(part, 0, begin, width, width, groups, begin // precision.group) for begin in range(0, row_bytes, width)
    )


def _row_bytes(part: Part) -> int:
    """Of a token in the lowest plane."""
    bits = part.precision.bits
    return part.channels * (2 if bits == 3 else bits) // 8


def _rows(part: Part, part_byte: int, begin: int, width: int, present: int, groups: int, first_group: int) -> Rows:
    precision, row_bytes = part.precision, _row_bytes(part)
    half = max(row_bytes // 2, 1)
    return Rows(
        bits=precision.bits,
        first_byte=part_byte + begin,
        row_bytes=row_bytes,
        width=width,
        present=present,
        high_byte=part_byte + BLOCK_TOKENS * row_bytes + begin % half,
        high_shift=begin // half,
        first_channel=part.first_channel + begin,
        metadata_byte=part_byte + precision.code_bytes(part.channels),
        scale_bits=precision.scale_bits,
        first_group=first_group,
        groups=groups,
        all_groups=precision.groups(part.channels),
    )
