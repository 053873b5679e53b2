"""PTX's types: how the bits of registers are numbers, and numbers bits. Rounding as the manual has it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED = {0: numpy.bool_, 1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}
_NUMPY = {"b": "u", "u": "u", "s": "i", "f": "f"}


@dataclass(frozen=True)
class Kind:
    """A type of PTX. size: of its bits, in bytes; 0: a predicate.

    numbers: of its bits, an unsigned array; of two halves with a last dimension of 2. bits: of such numbers, rounded to
    the nearest, halves to even.
    """

    name: str
    size: int
    numbers: Callable[[Array], Array]
    bits: Callable[[Array], Array]

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """That of its numbers."""
        return self.numbers(numpy.zeros(1, UNSIGNED[self.size])).dtype

    @property
    def is_float(self) -> bool:
        return self.name.startswith(("f", "bf"))

    @property
    def is_signed(self) -> bool:
        return self.name.startswith("s")

    @property
    def is_pair(self) -> bool:
        return self.name.endswith("x2")


def bfloat16_to_float32(bits: Array) -> Array:
    return (bits.astype(numpy.uint32) << numpy.uint32(16)).view(numpy.float32)


def float32_to_bfloat16(numbers: Array) -> Array:
    bits = numbers.view(numpy.uint32)
    half = numpy.uint32(0x7FFF) + (bits >> numpy.uint32(16) & numpy.uint32(1))
    rounded = ((bits + half) >> numpy.uint32(16)).astype(numpy.uint16)
    return numpy.where(numpy.isnan(numbers), numpy.uint16(0x7FFF), rounded)


def odd_float32(numbers: Array) -> Array:
    """float64 rounded to odd: rounded once more, to a shorter format, it is what rounding once would give."""
    near = numbers.astype(numpy.float32)
    inexact = (near.astype(numpy.float64) != numbers) & numpy.isfinite(near)
    beyond = inexact & (numpy.abs(near.astype(numpy.float64)) > numpy.abs(numbers))
    bits = near.view(numpy.uint32) - beyond.astype(numpy.uint32)
    return (bits | inexact.astype(numpy.uint32)).view(numpy.float32)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    total = a + b
    rest = total - a
    error = (a - (total - rest)) + (b - rest)
    bits = total.view(numpy.uint64)
    to_change = (error != 0) & numpy.isfinite(total) & ((bits & numpy.uint64(1)) == 0)
    further = (error > 0) == (total > 0)
    changed = numpy.where(further, bits | numpy.uint64(1), bits - numpy.uint64(1))
    return numpy.where(to_change, changed, bits).view(numpy.float64)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once by what becomes of it; float64 is rounded here."""
    if a.dtype != numpy.float64:
        # A product of two shorter numbers is exact in float64.
        return odd_sum(a.astype(numpy.float64) * b.astype(numpy.float64), c.astype(numpy.float64))
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halved(a), _halved(b)
    lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    result = total + (error + lost)
    return numpy.where(numpy.isfinite(result), result, product + c)


def _halved(x: Array) -> tuple[Array, Array]:
    """Veltkamp's splitting: two numbers of 26 bits."""
    spread = x * 134217729.0
    high = spread - (spread - x)
    return high, x - high


def _to_bfloat16(numbers: Array) -> Array:
    return float32_to_bfloat16(numbers if numbers.dtype == numpy.float32 else odd_float32(numbers.astype(float)))


def _to_float(dtype: Any, bits: Any) -> Callable[[Array], Array]:
    return lambda numbers: numbers.astype(dtype, copy=False).view(bits)


def _pair(half: Kind) -> Kind:
    def numbers(bits: Array) -> Array:
        both = half.numbers(numpy.ascontiguousarray(bits).view(numpy.uint16).reshape(-1, 2))
        return both.astype(numpy.float64) if half.is_float else both

    def bits(numbers: Array) -> Array:
        return numpy.ascontiguousarray(half.bits(numbers)).view(numpy.uint32).reshape(-1)

    return Kind(half.name + "x2", 4, numbers, bits)


def _plain(name: str) -> Kind:
    size = int(name[1:]) // 8
    own, unsigned = numpy.dtype(f"{_NUMPY[name[0]]}{size}"), UNSIGNED[size]
    if name[0] == "f":
        return Kind(name, size, lambda bits: bits.view(own), _to_float(own, unsigned))
    return Kind(name, size, lambda bits: bits.view(own), lambda numbers: numbers.astype(own, copy=False).view(unsigned))


PREDICATE = Kind("pred", 0, lambda bits: bits, lambda numbers: numbers)
KINDS = {"pred": PREDICATE, "bf16": Kind("bf16", 2, bfloat16_to_float32, _to_bfloat16)}
KINDS |= {name: _plain(name) for name in (f"{letter}{bits}" for letter in "bus" for bits in (8, 16, 32, 64))}
KINDS |= {name: _plain(name) for name in ("f16", "f32", "f64")}
KINDS |= {f"{name}x2": _pair(KINDS[name]) for name in ("f16", "bf16", "s16", "u16")}
