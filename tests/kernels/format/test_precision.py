"""What a precision costs, and what it refuses."""

import pytest

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import Axis, Precision


@pytest.mark.parametrize(
    ("precision", "stored_bits"),
    [
        (Precision(2, 32, 16), 3.0),
        (Precision(3, 32, 16), 4.0),
        (Precision(1, 64, 16), 1.5),
        (Precision(4, 16, 16), 6.0),
        # A byte for each group of 32 elements, and 64 bits for each block of 32 * 64 elements.
        (Precision(2, 32, 4), 2 + 8 / 32 + 64 / 2048),
        (Precision(8, 64, 4), 8 + 8 / 64 + 64 / 2048),
        (Precision(16), 16.0),
        (Precision(2, 32, 16, important_bits=(3, 3)), 2.5 + 1),
        # Each part begins its metadata with extremes of its own.
        (Precision(2, 32, 4, important_bits=(4, 4)), 3 + 8 / 32 + 2 * 64 / 2048),
        (Precision(4, 16, 4, important_bits=(8,)), 5 + 8 / 16 + 3 * 64 / 2048),
        (Precision(2, 32, 4, important_bits=(4, 3, 3)), 3 + 8 / 32 + 4 * 64 / 2048),
    ],
)
def test_stored_bits_count_codes_scales_and_zero_points(precision: Precision, stored_bits: float) -> None:
    assert precision.stored_bits(head_dim=64) == stored_bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_take_exactly_their_bits(bits: int) -> None:
    assert Precision(bits).code_bytes(head_dim=64) * 8 == 32 * 64 * bits


@pytest.mark.parametrize(
    ("important_bits", "channels"),
    [
        ((), {0: (2, 64)}),
        ((3, 3), {0: (3, 32), 32: (2, 32)}),
        ((4,), {0: (4, 16), 16: (2, 16), 32: (2, 32)}),
        ((4, 4, 3), {0: (4, 32), 32: (3, 16), 48: (2, 16)}),
        ((4, 3, 3), {0: (4, 16), 16: (3, 16), 32: (3, 16), 48: (2, 16)}),
        ((8, 4), {0: (8, 16), 16: (4, 16), 32: (2, 32)}),
    ],
)
def test_a_part_is_half_or_a_quarter_of_the_channels(
    important_bits: tuple[int, ...], channels: dict[int, tuple[int, int]]
) -> None:
    precision = Precision(2, 16, 4, important_bits)
    parts = precision.parts(head_dim=64)
    assert {part.first_channel: (part.precision.bits, part.channels) for part in parts} == channels
    assert all(part.precision == Precision(part.precision.bits, 16, 4) for part in parts)
    assert precision.mean_bits == sum(bits * count for bits, count in channels.values()) / 64
    assert precision.code_bytes(head_dim=64) * 8 == sum(32 * bits * count for bits, count in channels.values())


@pytest.mark.parametrize("itemsize", [2, 4])
def test_an_unquantized_block_takes_the_elements_own_size(itemsize: int) -> None:
    assert Precision(16).block_bytes(head_dim=80, itemsize=itemsize) == 32 * 80 * itemsize


@pytest.mark.parametrize("precision", [Precision(3, 64, 4), Precision(2, 16, 4, important_bits=(4, 3))])
def test_integers_carry_a_precision_through(precision: Precision) -> None:
    assert Precision.from_ints(precision.as_ints()) == precision


@pytest.mark.parametrize("arguments", [(5,), (0,), (2, 0), (2, 32, 8)])
def test_values_that_cannot_be_stored_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(KVMixError):
        Precision(*arguments)


@pytest.mark.parametrize(
    ("important_bits", "bits", "advice"),
    [
        ((2,), 2, "more bits"),
        ((4, 2), 3, "more bits"),
        ((-1,), 2, "more bits"),
        ((16,), 4, "at most 8"),
        ((16,), 16, "at most 8"),
        ((5,), 2, "1, 2, 3, 4, 8 or 16"),
        ((3, 4), 2, "none more than the one before"),
        ((4, 4, 4, 4), 2, "at most 3"),
    ],
)
def test_important_bits_that_cannot_be_stored_are_refused(
    important_bits: tuple[int, ...], bits: int, advice: str
) -> None:
    with pytest.raises(KVMixError, match=advice):
        Precision(bits, important_bits=important_bits)


@pytest.mark.parametrize(
    ("important_bits", "head_dim", "axis", "advice"),
    [
        ((4, 4), 64, Axis.CHANNELS, "only keys .* not values"),
        ((4, 4), 40, Axis.TOKENS, "multiple of 16 .* not keys of 40"),
        ((4, 4), 8, Axis.TOKENS, "multiple of 16 .* not keys of 8"),
        ((4,), 80, Axis.TOKENS, "multiple of 32 .* 4, 2, 2 and 2 bits .* not keys of 80"),
        ((4, 4), 20, Axis.TOKENS, "multiple of 8"),
    ],
)
def test_heads_that_cannot_have_important_channels_are_refused(
    important_bits: tuple[int, ...], head_dim: int, axis: Axis, advice: str
) -> None:
    with pytest.raises(KVMixError, match=advice):
        Precision(2, 32, 4, important_bits).check(head_dim, axis)


def test_three_integers_at_least_make_a_precision() -> None:
    with pytest.raises(KVMixError, match="important_bits"):
        Precision.from_ints([2, 32])


@pytest.mark.parametrize(
    ("group", "head_dim", "axis", "advice"),
    [
        (64, 64, Axis.TOKENS, "16 or 32"),
        (32, 80, Axis.CHANNELS, "20, 40 or 80"),
        (32, 20, Axis.TOKENS, "multiple of 8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_would(group: int, head_dim: int, axis: Axis, advice: str) -> None:
    with pytest.raises(KVMixError, match=advice):
        Precision(2, group).check(head_dim, axis)


def test_an_unquantized_head_may_have_any_size() -> None:
    Precision(16).check(head_dim=20, axis=Axis.CHANNELS)
