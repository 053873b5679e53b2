"""The float formats of engines: each of their numbers stays, what lies between is rounded, nothing overflows."""

import pytest
import torch

from kvmix_compile.kernels.format.floats import E4M3_MAX, FP8, NVFP4, e2m1, e4m3, fitting_scale

# OCP microscaling formats 1.0, table of E2M1.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_the_numbers_of_a_format_are_read_back_as_they_are() -> None:
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
    assert torch.equal(e2m1(levels), levels)
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every_byte[every_byte.isfinite()]
    assert len(finite) == 254  # all but the two that are no number
    assert torch.equal(e4m3(finite), finite)


def test_what_lies_between_goes_to_the_nearest_and_ties_to_the_even_one() -> None:
    found = e2m1(torch.tensor([0.24, 0.25, 0.26, 0.75, 1.25, 1.3, 1.75, 2.5, 2.6, 3.5, 5.0, 5.1, -2.6]))
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, -3.0]
    # Between 1 and 2, E4M3 has steps of an eighth.
    assert e4m3(torch.tensor([1.06, 1.0625, 1.07, 1.1875])).tolist() == [1.0, 1.0, 1.125, 1.25]


def test_what_lies_beyond_becomes_the_largest() -> None:
    assert e2m1(torch.tensor([7.0, -1e9])).tolist() == [6.0, -6.0]
    assert e4m3(torch.tensor([500.0, -1e9])).tolist() == [448.0, -448.0]
    assert FP8.as_stored(torch.tensor([1000.0])).item() == 448.0
    assert FP8.as_stored(torch.tensor([1000.0]), fitting_scale(1000.0)).item() == pytest.approx(1000.0)


def test_blocks_of_sixteen_channels_have_scales_of_their_own() -> None:
    small, large = torch.linspace(-1, 1, 16), torch.linspace(-100, 100, 16)
    both = NVFP4.as_stored(torch.cat([small, large]))
    assert torch.equal(both[:16], NVFP4.as_stored(small))
    assert torch.equal(both[16:], NVFP4.as_stored(large))
    # A block's largest element is 6 of its scale, which is an E4M3 number.
    scale = e4m3(torch.tensor(100.0 / 6))
    assert both[-1] == 6 * scale
    assert ((both[16:] / scale).abs().unsqueeze(-1) == torch.tensor(E2M1)).any(-1).all()


def test_zeros_stay_zeros_and_what_is_too_small_becomes_that() -> None:
    assert not NVFP4.as_stored(torch.zeros(2, 32)).any()
    tiny = torch.full((16,), 1e-9)
    assert not NVFP4.as_stored(tiny).any()
    assert NVFP4.as_stored(tiny, fitting_scale(1e-9)).allclose(tiny, rtol=0.05)
    assert fitting_scale(0.0) == 1.0
    assert fitting_scale(E4M3_MAX) == 1.0


def test_bits_and_heads() -> None:
    assert (FP8.bits, FP8.stored_bits, NVFP4.bits, NVFP4.stored_bits) == (8, 8, 4, 4.5)
    assert FP8.fits(24)
    assert NVFP4.fits(32)
    assert not NVFP4.fits(24)
