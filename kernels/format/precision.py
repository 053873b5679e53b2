"""How many bits a cached element takes, and how its scales and zero points are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import gcd

from kvmix_compile.kernels.errors import KVMixError

# Tokens of one head that are quantized together. KVmix and KIVI quantize keys in groups of 32 tokens.
BLOCK_TOKENS = 32

UNQUANTIZED_BITS = 16
BIT_WIDTHS = (1, 2, 3, 4, 8, UNQUANTIZED_BITS)
SCALE_BIT_WIDTHS = (4, 16)

# A channel count divisible by 8 lets a plane of one-bit codes fill whole bytes.
CHANNEL_MULTIPLE = 8

# Of a key's channels; a power of two, so that what is made of them has no odd sizes.
TIERS = 4

# With 4-bit scales a part of a block begins its metadata with four float16 numbers (see packing.py).
BLOCK_EXTREMES_BYTES = 8


class Axis(StrEnum):
    """The direction in which the elements of one group follow each other."""

    TOKENS = "tokens"  # keys: a group is one channel of several tokens
    CHANNELS = "channels"  # values: a group is several channels of one token


@dataclass(frozen=True, order=True)
class Precision:
    """One way of storing keys or values.

    bits: bits of a code: 1, 2, 3, 4 or 8; 16 keeps the elements in the model's dtype.
    group: elements that share a scale and a zero point.
    scale_bits: bits of a scale and of a zero point: 16 (float16) or 4 (relative to the block's own extremes).
    important_bits: of keys, bits of a code in the leading tiers of the channels, each more than `bits`, which are
        those of the other tiers, and no more than those before; empty where all channels have `bits`. Which
        channels of a model come first is not known here.
    """

    bits: int
    group: int = 32
    scale_bits: int = 16
    important_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in BIT_WIDTHS:
            raise KVMixError(f"{self.bits} bits cannot be stored; choose one of {_listed(BIT_WIDTHS)}")
        self._check_important_bits()
        if self.group < 1:
            raise KVMixError(f"a group holds at least one element, not {self.group}; 32 is the usual size")
        if self.scale_bits not in SCALE_BIT_WIDTHS:
            raise KVMixError(
                f"scales of {self.scale_bits} bits cannot be stored; choose one of {_listed(SCALE_BIT_WIDTHS)}"
            )

    def _check_important_bits(self) -> None:
        for bits in self.important_bits:
            if not self.bits < bits < UNQUANTIZED_BITS:
                raise KVMixError(
                    f"important channels have more bits than the others, which have {self.bits}, and at most "
                    f"{BIT_WIDTHS[-2]}, not {bits}"
                )
            if bits not in BIT_WIDTHS:
                raise KVMixError(f"{bits} bits cannot be stored; choose one of {_listed(BIT_WIDTHS)}")
        if len(self.important_bits) >= TIERS or list(self.important_bits) != sorted(self.important_bits)[::-1]:
            raise KVMixError(
                f"important_bits are those of the leading tiers of the channels, at most {TIERS - 1} and none "
                f"more than the one before, not {self.important_bits}"
            )

    @property
    def is_quantized(self) -> bool:
        """False when elements are kept in the model's dtype."""
        return self.bits < UNQUANTIZED_BITS

    @property
    def levels(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def tiers(self) -> tuple[int, ...]:
        """Bits of a code in each tier of the channels."""
        return *self.important_bits, *(self.bits,) * (TIERS - len(self.important_bits))

    @classmethod
    def of_tiers(cls, bits: Sequence[int], group: int, scale_bits: int) -> Precision:
        """The one whose `tiers` are these bits, none more than the one before."""
        return cls(bits[-1], group, scale_bits, tuple(number for number in bits if number > bits[-1]))

    @property
    def mean_bits(self) -> float:
        """Bits of a code, averaged over the channels."""
        return sum(self.tiers) / TIERS

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        """What a block of heads of this size consists of: all channels, halves or tiers of them, in order, each of
        the same bits throughout.
        """
        parts: list[Part] = []
        first_channel = 0
        for bits, tiers in self._shares():
            channels = head_dim * tiers // TIERS
            parts.append(Part(Precision(bits, self.group, self.scale_bits), first_channel, channels))
            first_channel += channels
        return tuple(parts)

    def _shares(self) -> list[tuple[int, int]]:
        """(bits, number of tiers) of each part."""
        first, second, third, fourth = self.tiers
        if first == fourth:
            return [(first, 4)]
        return [*_paired(first, second), *_paired(third, fourth)]

    def groups(self, head_dim: int) -> int:
        """Groups in a block of 32 tokens of one head."""
        return BLOCK_TOKENS * head_dim // self.group

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of a block's codes."""
        return int(BLOCK_TOKENS * head_dim * self.mean_bits) // 8

    def block_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of a block of 32 tokens of one head, everything counted.

        itemsize: bytes of an element of the model's dtype; matters only where nothing is quantized.
        """
        if not self.is_quantized:
            return BLOCK_TOKENS * head_dim * itemsize
        per_group_bits = 2 * self.scale_bits  # a scale and a zero point
        extremes = BLOCK_EXTREMES_BYTES * len(self._shares()) if self.scale_bits == 4 else 0
        return self.code_bytes(head_dim) + extremes + self.groups(head_dim) * per_group_bits // 8

    def stored_bits(self, head_dim: int) -> float:
        """Bits an element takes, scales and zero points counted."""
        if not self.is_quantized:
            return float(self.bits)
        return 8 * self.block_bytes(head_dim, itemsize=2) / (BLOCK_TOKENS * head_dim)

    def fits(self, head_dim: int, axis: Axis) -> bool:
        """Whether heads of this size can be stored like this."""
        try:
            self.check(head_dim, axis)
        except KVMixError:
            return False
        return True

    def check(self, head_dim: int, axis: Axis) -> None:
        """Raises KVMixError, naming what would do, where heads of this size cannot be stored like this."""
        if not self.is_quantized:
            return
        if head_dim < 1 or head_dim % CHANNEL_MULTIPLE:
            raise KVMixError(
                f"a head of {head_dim} channels cannot be quantized: the count must be a multiple of "
                f"{CHANNEL_MULTIPLE}; keep this site at {UNQUANTIZED_BITS} bits"
            )
        multiple = CHANNEL_MULTIPLE * TIERS // min(tiers for _, tiers in self._shares())
        if self.important_bits and (axis != Axis.TOKENS or head_dim % multiple):
            raise KVMixError(
                f"only keys of a multiple of {multiple} channels can have {_listed(self.tiers, 'and')} bits in the "
                f"tiers of these, not {'values' if axis != Axis.TOKENS else f'keys of {head_dim}'}"
            )
        extent = BLOCK_TOKENS if axis == Axis.TOKENS else head_dim
        if extent % self.group:
            raise KVMixError(
                f"groups of {self.group} do not fill {extent} {axis}; choose a group of {_listed(_divisors(extent))}"
            )

    def as_ints(self) -> list[int]:
        """For an operator's schema, which knows integers only."""
        return [self.bits, self.group, self.scale_bits, *self.important_bits]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Precision:
        """The inverse of as_ints."""
        if len(ints) < 3:
            raise KVMixError(f"a precision is [bits, group, scale_bits, *important_bits], not {list(ints)}")
        bits, group, scale_bits, *important_bits = ints
        return cls(bits, group, scale_bits, tuple(important_bits))


@dataclass(frozen=True)
class Part:
    """Neighbouring channels of a head that are stored at one precision."""

    precision: Precision
    first_channel: int
    channels: int


def _paired(first: int, second: int) -> list[tuple[int, int]]:
    """Two tiers of the channels as Precision._shares."""
    return [(first, 2)] if first == second else [(first, 1), (second, 1)]


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(candidate for candidate in range(1, number + 1) if gcd(candidate, number) == candidate)


def _listed(choices: Sequence[int], last: str = "or") -> str:
    return ", ".join(map(str, choices[:-1])) + f" {last} {choices[-1]}" if len(choices) > 1 else str(choices[0])
