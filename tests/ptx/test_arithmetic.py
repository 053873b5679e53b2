"""Instructions against what the PTX manual says of them, worked out otherwise: exactly, or by Python's integers."""

from fractions import Fraction
from math import isfinite, nextafter

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ptx.arithmetic import form
from tests.ptx.numbers import KINDS, Array

WORD = 2**32 - 1
words = st.integers(0, WORD)
# Few bits and near exponents: sums that are halfway between two numbers come up.
coarse = st.builds(lambda digits, exponent: digits * 2.0**exponent, st.integers(-(2**24), 2**24), st.integers(-40, 4))


def compute(operation: str, *operands: int | float) -> Array:
    """The result as numbers; operands are integers of a register's bits, or floats."""
    found = form(operation.split("."))
    assert found
    numbers = [
        numpy.array([operand], kind.dtype)
        if isinstance(operand, float)
        else kind.numbers(numpy.array([operand], kind_bits(kind)))
        for operand, kind in zip(operands, found.sources, strict=True)
    ]
    with numpy.errstate(all="ignore"):
        return found.result.numbers(found.result.bits(found.compute(*numbers)))


def kind_bits(kind: object) -> str:
    size = kind.size  # type: ignore[attr-defined]
    return f"u{size}" if size else "bool"


def bits(operation: str, *operands: int) -> int:
    found = form(operation.split("."))
    assert found
    numbers = [
        kind.numbers(numpy.array([operand & (1 << 8 * kind.size) - 1], kind_bits(kind)))
        for operand, kind in zip(operands, found.sources, strict=True)
    ]
    return int(found.result.bits(found.compute(*numbers))[0])


@given(coarse, coarse, coarse)
def test_a_product_and_a_sum_are_rounded_once(a: float, b: float, c: float) -> None:
    a, b, c = (float(numpy.float32(x)) for x in (a, b, c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = float(compute("fma.rn.f32", a, b, c)[0])
    # float rounds a Fraction once; a float32 that is nearest has no nearer neighbour.
    neighbours = [float(numpy.nextafter(numpy.float32(found), numpy.float32(to))) for to in (-numpy.inf, numpy.inf)]
    error = abs(Fraction(found) - exact)
    for neighbour in neighbours:
        assert error <= abs(Fraction(neighbour) - exact)
        if error == abs(Fraction(neighbour) - exact) and error:
            assert int(numpy.float32(found).view(numpy.uint32)) % 2 == 0


@given(*[st.floats(-1e100, 1e100).filter(lambda x: x == 0 or abs(x) > 1e-100)] * 3)
def test_so_they_are_in_double_precision(a: float, b: float, c: float) -> None:
    exact = float(Fraction(a) * Fraction(b) + Fraction(c))
    found = float(compute("fma.rn.f64", a, b, c)[0])
    # The sum of the two errors is itself rounded: at worst the neighbour.
    assert isfinite(found) and exact in (nextafter(found, -torch.inf), found, nextafter(found, torch.inf))


@given(st.floats(width=32))
def test_conversions_to_16_bits_round_as_pytorch_does(number: float) -> None:
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        expected = torch.tensor(number, dtype=torch.float32).to(dtype)
        found = float(compute(f"cvt.rn.{name}.f32", number)[0])
        assert found == float(expected) or (found != found and expected != expected)


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
def test_a_pair_is_two_numbers(low: int, high: int) -> None:
    found = compute("fma.rn.f16x2", low | high << 16, 0x3C003C00, 0).reshape(-1)
    expected = numpy.array([low, high], numpy.uint16).view(numpy.float16)
    numpy.testing.assert_array_equal(found.astype(numpy.float16), expected)
    joined = compute("cvt.rn.f16x2.f32", 1.5, -2.0).reshape(-1)
    assert joined.tolist() == [-2.0, 1.5]


@given(words, words)
def test_a_pair_of_integers_is_two_sums_without_a_carry(a: int, b: int) -> None:
    low, high = (a + b) & 0xFFFF, ((a >> 16) + (b >> 16)) & 0xFFFF
    assert bits("add.s16x2", a, b) == bits("add.u16x2", a, b) == low | high << 16


@given(words, words, words, st.integers(0, 255))
def test_lop3_is_a_table_of_three_bits(a: int, b: int, c: int, table: int) -> None:
    expected = sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
    assert bits("lop3.b32", a, b, c, table) == expected


@given(words, words, words)
def test_prmt_picks_bytes_or_their_signs(a: int, b: int, selectors: int) -> None:
    both = (a | b << 32).to_bytes(8, "little")
    expected = []
    for place in range(4):
        selector = selectors >> 4 * place & 15
        byte = both[selector & 7]
        expected.append((255 if byte > 127 else 0) if selector & 8 else byte)
    assert bits("prmt.b32", a, b, selectors) == int.from_bytes(bytes(expected), "little")


@given(words, words, st.integers(0, 80))
def test_shifts_of_one_and_of_two_registers(a: int, b: int, count: int) -> None:
    both = a | b << 32
    assert bits("shf.l.wrap.b32", a, b, count) == (both << count % 32) >> 32 & WORD
    assert bits("shf.r.wrap.b32", a, b, count) == both >> count % 32 & WORD
    assert bits("shf.l.clamp.b32", a, b, count) == (both << min(count, 32)) >> 32 & WORD
    assert bits("shl.b32", a, count) == (a << count) & WORD
    assert bits("shr.u32", a, count) == a >> count
    signed = a - 2**32 if a >> 31 else a
    assert bits("shr.s32", a, count) == signed >> min(count, 31) & WORD


@given(words, st.integers(0, 40), st.integers(0, 40))
def test_bfe_takes_a_field(a: int, place: int, length: int) -> None:
    assert bits("bfe.u32", a, place, length) == a >> place & (1 << min(length, 32)) - 1
    end = min(place + length, 32)
    signed = a - 2**32 if a >> 31 else a
    field = (a & (1 << end) - 1) >> place if place < 32 else 0
    if place >= 32:
        expected = signed >> 31 if length else 0
    else:
        expected = field - (1 << end - place) if length and field >> (end - place - 1) & 1 else field
    assert bits("bfe.s32", a, place, length) == expected & WORD


@given(words, words, words)
def test_products_of_integers(a: int, b: int, c: int) -> None:
    signed = [x - 2**32 if x >> 31 else x for x in (a, b, c)]
    assert bits("mul.lo.s32", a, b) == a * b & WORD
    assert bits("mul.hi.u32", a, b) == a * b >> 32
    assert bits("mul.hi.s32", a, b) == signed[0] * signed[1] >> 32 & WORD
    assert bits("mul.wide.s32", a, b) == signed[0] * signed[1] & 2**64 - 1
    assert bits("mad.lo.s32", a, b, c) == a * b + c & WORD
    assert bits("mad.wide.u32", a, b, c) == a * b + c
    assert bits("mul.hi.u16", a, b) == (a & 65535) * (b & 65535) >> 16


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1).filter(bool))
def test_division_goes_towards_zero(a: int, b: int) -> None:
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    if quotient < 2**31:
        assert bits("div.s32", a, b) == quotient & WORD
        assert bits("rem.s32", a, b) == a - quotient * b & WORD


@pytest.mark.parametrize(
    ("operation", "number", "expected"),
    [
        ("cvt.rzi.s32.f32", -1.7, -1),
        ("cvt.rzi.s32.f32", 3e9, 2**31 - 1),
        ("cvt.rzi.s32.f32", float("nan"), 0),
        ("cvt.rni.s32.f32", 2.5, 2),
        ("cvt.rmi.s32.f32", -0.5, -1),
        ("cvt.rzi.u32.f32", -4.0, 0),
    ],
)
def test_conversions_to_integers_are_rounded_and_clamped(operation: str, number: float, expected: int) -> None:
    assert compute(operation, number).tolist() == [expected]


def test_what_is_no_number_is_unordered() -> None:
    nan = float("nan")
    for operation in ("ltu", "geu", "equ", "neu", "nan"):
        assert compute(f"setp.{operation}.f32", 1.0, nan).all()
    for operation in ("lt", "ge", "eq", "ne", "num"):
        assert not compute(f"setp.{operation}.f32", 1.0, nan).any()
    assert compute("max.f32", 1.0, nan).tolist() == [1.0]
    assert numpy.isnan(compute("max.NaN.f32", 1.0, nan)).all()


def test_every_type_is_its_own_inverse() -> None:
    for name in ("u8", "s16", "b32", "s64", "f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "s16x2"):
        kind = KINDS[name]
        some = numpy.arange(1, 9, dtype=f"u{kind.size}") * (0x3C01 if kind.size > 1 else 1)
        numpy.testing.assert_array_equal(kind.bits(kind.numbers(some)), some)
