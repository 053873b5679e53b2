"""What a precision costs, and what it refuses."""

import pytest

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.precision import Axis, Precision


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
    ],
)
def test_stored_bits_count_codes_scales_and_zero_points(precision: Precision, stored_bits: float) -> None:
    assert precision.stored_bits(head_dim=64) == stored_bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_take_exactly_their_bits(bits: int) -> None:
    assert Precision(bits).code_bytes(head_dim=64) * 8 == 32 * 64 * bits


@pytest.mark.parametrize("itemsize", [2, 4])
def test_an_unquantized_block_takes_the_elements_own_size(itemsize: int) -> None:
    assert Precision(16).block_bytes(head_dim=80, itemsize=itemsize) == 32 * 80 * itemsize


def test_integers_carry_a_precision_through() -> None:
    precision = Precision(3, 64, 4)
    assert Precision.from_ints(precision.as_ints()) == precision


@pytest.mark.parametrize("arguments", [(5,), (0,), (2, 0), (2, 32, 8)])
def test_values_that_cannot_be_stored_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(KVMixError):
        Precision(*arguments)


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
