"""What instructions compute that look at nothing but their own operands, as a table: FORMS, by their first word."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from tests.ptx.numbers import KINDS, PREDICATE, Array, Kind, fused
from tests.ptx.syntax import PtxError

B32, B64, U32 = KINDS["b32"], KINDS["b64"], KINDS["u32"]


@dataclass(frozen=True)
class Form:
    """sources: how operands are read. compute: of their numbers, those of `result`."""

    sources: tuple[Kind, ...]
    result: Kind
    compute: Callable[..., Array]


def form(words: Sequence[str]) -> Form | None:
    """Of an operation's words; None where it is none of these."""
    make = FORMS.get(words[0])
    kinds = [KINDS[word] for word in words if word in KINDS]
    return make(words, kinds) if make and kinds else None


def _alike(count: int, compute: Callable[..., Array]) -> Callable[..., Form]:
    """Operands and result of the instruction's own type."""
    return lambda words, kinds: Form((kinds[-1],) * count, kinds[-1], compute)


def _wide(kind: Kind) -> Kind:
    return KINDS[f"{kind.name[0]}{16 * kind.size}"]


def _product(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,) = kinds
    if "wide" not in words and "hi" not in words:
        return Form((kind, kind), kind, numpy.multiply)
    if kind.size == 8:
        raise PtxError(f"{'.'.join(words)}: no integers of 128 bits here")
    wide = _wide(kind)

    def multiply(a: Array, b: Array) -> Array:
        product = a.astype(wide.dtype) * b
        return product >> 8 * kind.size if "hi" in words else product

    return Form((kind, kind), wide if "wide" in words else kind, multiply)


def _product_and_sum(words: Sequence[str], kinds: list[Kind]) -> Form:
    product = _product(words, kinds)
    return Form(
        (*product.sources, product.result), product.result, lambda a, b, c: (product.compute(a, b) + c).astype(c.dtype)
    )


def _least_or_most(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,) = kinds
    least = words[0] == "min"
    if kind.is_float and "NaN" not in words:
        return Form((kind, kind), kind, numpy.fmin if least else numpy.fmax)
    function = numpy.minimum if least else numpy.maximum
    if "relu" in words:
        return Form((kind, kind), kind, lambda a, b: numpy.maximum(function(a, b), a.dtype.type(0)))
    return Form((kind, kind), kind, function)


ORDERED = {
    "eq": numpy.equal,
    "ne": numpy.not_equal,
    "lt": numpy.less,
    "le": numpy.less_equal,
    "gt": numpy.greater,
    "ge": numpy.greater_equal,
}
UNSIGNED_ORDERED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,), name = kinds, words[1]
    if any(word in words[2:] for word in ("and", "or", "xor")):
        raise PtxError(f"{'.'.join(words)}: comparisons are not joined here")

    def unordered(a: Array, b: Array) -> Array:
        return numpy.isnan(a) | numpy.isnan(b)

    special = {"nan": unordered, "num": lambda a, b: ~unordered(a, b)}
    if name in special:
        return Form((kind, kind), PREDICATE, special[name])
    if kind.is_float and name[-1] == "u" and name[:-1] in ORDERED:
        return Form((kind, kind), PREDICATE, lambda a, b: ORDERED[name[:-1]](a, b) | unordered(a, b))
    compare = ORDERED[UNSIGNED_ORDERED.get(name, name)]
    if kind.is_float and name == "ne":
        return Form((kind, kind), PREDICATE, lambda a, b: compare(a, b) & ~unordered(a, b))
    return Form((kind, kind), PREDICATE, compare)


def _choice(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,) = kinds
    bits = KINDS[f"b{8 * kind.size}"]
    return Form((bits, bits, PREDICATE), bits, lambda a, b, first: numpy.where(first, a, b))


def _shift(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,) = kinds
    width = 8 * kind.size

    def shift(a: Array, count: Array) -> Array:
        within = numpy.minimum(count, numpy.uint32(width - 1)).astype(a.dtype)
        if words[0] == "shl":
            return numpy.where(count < width, a << within, a.dtype.type(0))
        return a >> within if kind.is_signed else numpy.where(count < width, a >> within, a.dtype.type(0))

    return Form((kind, U32), kind, shift)


def _funnel_shift(words: Sequence[str], kinds: list[Kind]) -> Form:
    """Of two registers as one of 64 bits, the second one the higher: its upper or its lower half."""

    def shift(low: Array, high: Array, count: Array) -> Array:
        bits = (count & U32_31 if "wrap" in words else numpy.minimum(count, numpy.uint32(32))).astype(numpy.uint64)
        both = low.astype(numpy.uint64) | high.astype(numpy.uint64) << numpy.uint64(32)
        shifted = (both << bits) >> numpy.uint64(32) if words[1] == "l" else both >> bits
        return shifted.astype(numpy.uint32)

    return Form((B32, B32, U32), B32, shift)


U32_31 = numpy.uint32(31)


def _bit_field(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,) = kinds

    def extract(a: Array, place: Array, length: Array) -> Array:
        place, length = (numpy.minimum(x & numpy.uint32(255), numpy.uint32(32)) for x in (place, length))
        wide = a.astype(numpy.int64)
        end = numpy.minimum(place + length, 32).astype(numpy.int64)
        if not kind.is_signed:
            return (wide >> place & (1 << length.astype(numpy.int64)) - 1).astype(a.dtype)
        # The field's highest bit, or the register's, fills what is above it.
        filled = (wide << 64 - end) >> 64 - end >> place
        return numpy.where(length == 0, 0, filled).astype(a.dtype)

    return Form((kind, U32, U32), kind, extract)


def _permuted(a: Array, b: Array, selectors: Array) -> Array:
    a, b, selectors = numpy.broadcast_arrays(a, b, selectors)
    both = a.astype(numpy.uint64) | b.astype(numpy.uint64) << numpy.uint64(32)
    result = numpy.zeros(a.shape, numpy.uint32)
    for place in range(4):
        selector = selectors >> numpy.uint32(4 * place) & numpy.uint32(15)
        shift = (selector & numpy.uint32(7)).astype(numpy.uint64) * numpy.uint64(8)
        byte = (both >> shift).astype(numpy.uint32) & numpy.uint32(255)
        # The selector's highest bit wants the byte's sign, eight times.
        byte = numpy.where(selector & numpy.uint32(8), (byte >> numpy.uint32(7)) * numpy.uint32(255), byte)
        result |= byte << numpy.uint32(8 * place)
    return result


def _by_table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit 4 a + 2 b + c of the table."""
    result = numpy.zeros(numpy.broadcast_shapes(a.shape, b.shape, c.shape), numpy.uint32)
    for row in range(8):
        if int(table[0]) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


ROUNDED = {"rmi": numpy.floor, "rpi": numpy.ceil, "rzi": numpy.trunc, "rni": numpy.rint}


def _conversion(words: Sequence[str], kinds: list[Kind]) -> Form:
    target, source = kinds
    if target.is_pair:
        # The first operand becomes the higher half.
        return Form((source, source), target, lambda high, low: numpy.stack(numpy.broadcast_arrays(low, high), -1))
    if "sat" in words and not target.name.startswith(("u", "s")):
        raise PtxError(f"{'.'.join(words)}: nothing saturates here")
    if not source.is_float:
        return Form((source,), target, lambda x: x)
    round_ = next((ROUNDED[word] for word in words if word in ROUNDED), None)
    if target.is_float:
        return Form((source,), target, (lambda x: round_(x)) if round_ else (lambda x: x))
    assert round_, words
    return Form((source,), target, lambda x: _clamped(round_(x), target))


def _clamped(x: Array, target: Kind) -> Array:
    """To integers: what is beyond them becomes the nearest one, and what is no number 0."""
    limits = numpy.iinfo(target.dtype)
    # The largest float64 that is no more than the limit.
    most = numpy.nextafter(2.0 ** (limits.bits - target.is_signed), 0) if limits.bits == 64 else float(limits.max)
    return numpy.clip(numpy.where(numpy.isnan(x), 0, x).astype(numpy.float64), float(limits.min), most).astype(
        target.dtype
    )


def _quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    # What division by 0 gives is not defined.
    divisor = numpy.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // divisor
    magnitude = numpy.abs(a) // numpy.abs(divisor)
    return numpy.where((a < 0) != (divisor < 0), -magnitude, magnitude)


def _remainder(a: Array, b: Array) -> Array:
    """With the sign of the dividend."""
    return a - _quotient(a, b) * b


def _reciprocal(words: Sequence[str], kinds: list[Kind]) -> Form:
    (kind,) = kinds
    if kind.name != "f64":
        return Form((kind,), kind, lambda x: x.dtype.type(1) / x)
    # The approximate one has the upper half of the bits.
    upper = numpy.uint64(0xFFFFFFFF00000000)
    return Form((kind,), kind, lambda x: ((1 / x).view(numpy.uint64) & upper).view(numpy.float64))


FORMS: dict[str, Callable[..., Form]] = {
    "mov": _alike(1, lambda x: x),
    "add": _alike(2, numpy.add),
    "sub": _alike(2, numpy.subtract),
    "mul": _product,
    "mad": _product_and_sum,
    "fma": _alike(3, fused),
    "div": _alike(2, _quotient),
    "rem": _alike(2, _remainder),
    "min": _least_or_most,
    "max": _least_or_most,
    "neg": _alike(1, numpy.negative),
    "abs": _alike(1, numpy.abs),
    "ex2": _alike(1, numpy.exp2),
    "lg2": _alike(1, numpy.log2),
    "sqrt": _alike(1, numpy.sqrt),
    "rsqrt": _alike(1, lambda x: 1 / numpy.sqrt(x)),
    "rcp": _reciprocal,
    "and": _alike(2, numpy.bitwise_and),
    "or": _alike(2, numpy.bitwise_or),
    "xor": _alike(2, numpy.bitwise_xor),
    "not": _alike(1, numpy.invert),
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel_shift,
    "bfe": _bit_field,
    "prmt": lambda words, kinds: Form((B32, B32, B32), B32, _permuted),
    "lop3": lambda words, kinds: Form((B32, B32, B32, U32), B32, _by_table),
    "setp": _comparison,
    "selp": _choice,
    "cvt": _conversion,
}
