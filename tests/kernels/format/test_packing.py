"""The packed bytes: their exact layout, and how far a dequantized element lies from the original."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.packing import REACH, dequantize_block, kept_range, quantize_block
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Axis, Precision
from tests.kernels.layouts import IMPORTANT_BITS

FLOAT16_MAX = 65504.0
QUANTIZED_BITS = [1, 2, 3, 4, 8]


def float16_bytes(*numbers: float) -> list[int]:
    return torch.tensor(numbers, dtype=torch.float16).view(torch.uint8).tolist()


def test_two_bit_keys_byte_by_byte() -> None:
    token, channel = torch.arange(32).unsqueeze(1), torch.arange(8)
    keys = ((token + channel) % 4).float()

    packed = quantize_block(keys, Precision(2, 32, 16), Axis.TOKENS).tolist()

    # Token 0 has codes 0 1 2 3 0 1 2 3. Its first byte holds channels 0 2 4 6, its second 1 3 5 7, lowest bits first.
    assert packed[0:2] == [0b10_00_10_00, 0b11_01_11_01]
    # Token 1 has codes 1 2 3 0 1 2 3 0.
    assert packed[2:4] == [0b11_01_11_01, 0b00_10_00_10]
    assert packed[64:] == float16_bytes(*[1.0] * 8, *[0.0] * 8)


def test_three_bit_values_byte_by_byte() -> None:
    values = torch.arange(8.0).repeat(32, 1)

    packed = quantize_block(values, Precision(3, 8, 16), Axis.CHANNELS).tolist()

    # The low two bits of the codes 0 to 7 are 0 1 2 3 0 1 2 3, as above; their high bits are 0 0 0 0 1 1 1 1.
    assert packed[0:2] == [0b10_00_10_00, 0b11_01_11_01]
    assert packed[64] == 0b11110000
    assert packed[96:] == float16_bytes(*[1.0] * 32, *[0.0] * 32)


def test_four_bit_scales_and_zero_points_byte_by_byte() -> None:
    token = torch.arange(32.0)
    zero_point, scale = token % 16, 4 ** (token % 2)
    values = zero_point.unsqueeze(1) + scale.unsqueeze(1) * torch.tensor([0.0, 15.0] * 4)

    packed = quantize_block(values, Precision(4, 8, 4), Axis.CHANNELS).tolist()

    # Each byte holds channels p and p + 4, both of code 0 or both of code 15.
    assert packed[:128] == [0x00, 0xFF] * 64
    # log2 scales reach from 0 to 2 and zero points from 0 to 15.
    assert packed[128:136] == float16_bytes(0.0, 2.0, 0.0, 15.0)
    assert packed[136:140] == [0x00, 0x1F, 0x20, 0x3F]


@pytest.mark.parametrize("scale_bits", [4, 16])
def test_important_channels_byte_by_byte(scale_bits: int) -> None:
    token, channel = torch.arange(32).unsqueeze(1), torch.arange(8)
    important, others = (token + channel) % 16, 7 - (token + channel) % 8
    keys = torch.cat([important, others], dim=1).float()
    one, zero = float16_bytes(1.0), float16_bytes(0.0)

    packed = quantize_block(keys, Precision(3, 32, scale_bits, (4, 4)), Axis.TOKENS).tolist()

    # The important half is a block of 8 channels of its own: token 0 has codes 0 to 7, two a byte, p beside p + 4.
    assert packed[0:4] == [0x40, 0x51, 0x62, 0x73]
    # Scales of 1 = 2**0 and zero points of 0: the extremes are 0, and so are all nibbles.
    metadata = (one * 8 + zero * 8) if scale_bits == 16 else [0] * 16
    other_half = 128 + len(metadata)
    assert packed[128:other_half] == metadata
    # The block of the other half follows: token 0 has codes 7 to 0, whose low two bits are 3 2 1 0 3 2 1 0 ..
    assert packed[other_half : other_half + 2] == [0b01_11_01_11, 0b00_10_00_10]
    # .. and whose high bits are 1 1 1 1 0 0 0 0.
    assert packed[other_half + 64] == 0b00001111
    assert packed[other_half + 96 :] == metadata


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_coarse_codes_span_the_middle_of_a_group_and_fine_ones_all_of_it(bits: int, axis: Axis) -> None:
    block = torch.linspace(-1, 1, 32).repeat(32, 1)
    block = block.T if axis == Axis.TOKENS else block
    precision = Precision(bits, 32, 4)
    restored = dequantize_block(quantize_block(block, precision, axis), precision, axis, 32, torch.float32)
    kept = min(1.0, REACH[axis].get(bits, torch.inf) / 2.067)
    # Zero points and scales of 8-bit codes are rounded with a bias of their own; see NIBBLE_BIAS.
    tolerance = 3e-3 if bits == 8 else 1e-3
    assert restored.amin().item() == pytest.approx(-kept, abs=tolerance)
    assert restored.amax().item() == pytest.approx(kept, abs=tolerance)


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize(("bits", "most"), [(1, 0.65), (2, 0.17), (3, 0.05), (4, 0.012)])
def test_normally_distributed_elements_lose_little_of_their_variance(
    bits: int, most: float, group: int, axis: Axis
) -> None:
    """A uniform quantizer of least error loses 0.363, 0.119, 0.037 and 0.0115 of it (Max, 1960)."""
    blocks = torch.randn(64, BLOCK_TOKENS, 64, generator=torch.Generator().manual_seed(0))
    precision = Precision(bits, group, 4)
    restored = dequantize_block(quantize_block(blocks, precision, axis), precision, axis, 64, torch.float32)
    assert (restored - blocks).square().mean().item() < most


def test_scales_of_16_bits_keep_the_whole_range() -> None:
    assert kept_range(Precision(2, 32, 16), Axis.TOKENS) == 1.0
    assert kept_range(Precision(2, 1, 4), Axis.CHANNELS) == 1.0


def test_an_unquantized_block_is_the_elements_own_bytes() -> None:
    block = torch.randn(3, 32, 20).bfloat16()
    packed = quantize_block(block, Precision(16), Axis.TOKENS)
    assert torch.equal(packed, block.view(torch.uint8).flatten(-2))
    assert torch.equal(dequantize_block(packed, Precision(16), Axis.TOKENS, 20, torch.bfloat16), block)


def test_a_block_has_32_tokens() -> None:
    with pytest.raises(KVMixError, match="32"):
        quantize_block(torch.zeros(31, 8), Precision(2), Axis.TOKENS)


@pytest.mark.parametrize(("axis", "group"), [(Axis.TOKENS, 32), (Axis.CHANNELS, 8)])
@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_blocks_are_self_contained(bits: int, scale_bits: int, axis: Axis, group: int) -> None:
    check_self_contained(Precision(bits, group, scale_bits), axis, head_dim=24)


@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize(("important_bits", "bits"), IMPORTANT_BITS)
def test_blocks_with_important_channels_are_self_contained(
    important_bits: tuple[int, ...], bits: int, scale_bits: int
) -> None:
    check_self_contained(Precision(bits, 16, scale_bits, important_bits), Axis.TOKENS, head_dim=64)


def check_self_contained(precision: Precision, axis: Axis, head_dim: int) -> None:
    blocks = torch.randn(2, 3, 5, BLOCK_TOKENS, head_dim)
    packed = quantize_block(blocks, precision, axis)
    restored = dequantize_block(packed, precision, axis, head_dim, torch.float32)
    assert packed.shape == (2, 3, 5, precision.block_bytes(head_dim, blocks.itemsize))
    for place in product(range(2), range(3), range(5)):
        alone = quantize_block(blocks[place].mT.contiguous().mT, precision, axis)
        assert torch.equal(packed[place], alone)
        assert torch.equal(restored[place], dequantize_block(alone, precision, axis, head_dim, torch.float32))


@pytest.mark.parametrize("axis", list(Axis))
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_four_bit_scales_cost_little(bits: int, axis: Axis) -> None:
    def mean_squared_error(scale_bits: int) -> float:
        precision = Precision(bits, 32, scale_bits)
        packed = quantize_block(blocks, precision, axis)
        return (dequantize_block(packed, precision, axis, 64, torch.float32) - blocks).square().mean().item()

    blocks = torch.randn(50, BLOCK_TOKENS, 64)
    assert mean_squared_error(4) < 1.1 * mean_squared_error(16)


def stored_range(packed: Tensor, precision: Precision, axis: Axis, head_dim: int) -> tuple[Tensor, Tensor]:
    """A group's scale and zero point for each element of one block, read from the bytes as documented."""
    metadata = packed[precision.code_bytes(head_dim) :]
    if precision.scale_bits == 16:
        scale, zero_point = metadata.view(torch.float16).double().chunk(2)
    else:
        extremes = metadata[:8].view(torch.float16).double()
        nibbles = metadata[8:].double()
        zero_point = extremes[2] + (nibbles // 16) / 15 * (extremes[3] - extremes[2])
        scale = torch.exp2(extremes[0] + (nibbles % 16) / 15 * (extremes[1] - extremes[0]))
    shape, dim = ((-1, head_dim), 0) if axis == Axis.TOKENS else ((BLOCK_TOKENS, -1), 1)
    scale, zero_point = (
        of_group.view(shape).repeat_interleave(precision.group, dim) for of_group in (scale, zero_point)
    )
    return scale, zero_point


@st.composite
def hard_blocks(draw: st.DrawFn) -> Tensor:
    """A block whose channels and tokens differ wildly in size, with constant stretches and single extreme elements."""
    head_dim = draw(st.sampled_from([8, 24, 64]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    low, high = sorted((draw(st.integers(-40, 37)), draw(st.integers(-40, 37))))
    sizes = 10.0 ** torch.randint(low, high + 1, (1, head_dim), generator=generator).double()
    offset = draw(st.sampled_from([0.0, 1.0, -1000.0, 1e30]))
    block = torch.randn(BLOCK_TOKENS, head_dim, generator=generator, dtype=torch.float64) * sizes + offset
    if draw(st.booleans()):
        block[:, : head_dim // 2] = block[0, 0]
    if draw(st.booleans()):
        block[5] = 0.0
    if draw(st.booleans()):
        block[3, 4] = draw(st.sampled_from([1e38, -1e38, 65504.0, -7e4, 1e-45]))
    if draw(st.booleans()):
        block = block.clone().fill_(block[0, 0])
    limit = torch.finfo(dtype).max
    return block.clamp(-limit, limit).to(dtype)


@settings(max_examples=300)
@given(hard_blocks(), st.sampled_from(QUANTIZED_BITS), st.sampled_from([8, 4, 2]), st.sampled_from([4, 16]), st.data())
def test_an_element_is_within_half_a_step_of_the_original(
    block: Tensor, bits: int, group: int, scale_bits: int, data: st.DataObject
) -> None:
    axis = data.draw(st.sampled_from(list(Axis)))
    head_dim = block.shape[-1]
    precision = Precision(bits, group, scale_bits)

    packed = quantize_block(block, precision, axis)
    restored = dequantize_block(packed, precision, axis, head_dim, torch.float32).double()

    scale, zero_point = stored_range(packed, precision, axis, head_dim)
    highest = zero_point + scale * precision.levels
    original = block.double().clamp(-FLOAT16_MAX, FLOAT16_MAX).maximum(zero_point).minimum(highest)
    rounding_in_float32 = 1e-6 * (zero_point.abs() + highest.abs())
    assert torch.isfinite(restored).all()
    assert ((restored - original).abs() <= 0.5001 * scale + rounding_in_float32).all()


@given(hard_blocks(), st.sampled_from(IMPORTANT_BITS), st.sampled_from([16, 32]), st.sampled_from([4, 16]))
def test_each_part_is_restored_as_if_it_were_alone(
    tier: Tensor, both_bits: tuple[tuple[int, ...], int], group: int, scale_bits: int
) -> None:
    important_bits, bits = both_bits
    important, head_dim = Precision(bits, group, scale_bits, important_bits), 4 * tier.shape[1]
    keys = torch.cat([tier, tier.flip(0) * 1e-3, tier, tier.flip(0)], dim=1)
    packed = quantize_block(keys, important, Axis.TOKENS)
    restored = dequantize_block(packed, important, Axis.TOKENS, head_dim, keys.dtype)
    for part in important.parts(head_dim):
        channels = slice(part.first_channel, part.first_channel + part.channels)
        packed_alone = quantize_block(keys[:, channels], part.precision, Axis.TOKENS)
        alone = dequantize_block(packed_alone, part.precision, Axis.TOKENS, part.channels, keys.dtype)
        assert torch.equal(restored[:, channels], alone)


@given(hard_blocks(), st.sampled_from(QUANTIZED_BITS), st.sampled_from([4, 16]), st.sampled_from(list(Axis)))
def test_elements_are_finite_in_the_models_own_dtype(block: Tensor, bits: int, scale_bits: int, axis: Axis) -> None:
    precision = Precision(bits, 8, scale_bits)
    restored = dequantize_block(quantize_block(block, precision, axis), precision, axis, block.shape[-1], block.dtype)
    assert restored.dtype == block.dtype
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize("axis", list(Axis))
@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_elements_as_large_as_float16_goes_stay_finite_in_it(bits: int, scale_bits: int, axis: Axis) -> None:
    blocks = (torch.rand(20, BLOCK_TOKENS, 64, dtype=torch.float64) * 2 - 1).mul(FLOAT16_MAX * 1.2)
    blocks = blocks.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    precision = Precision(bits, 8, scale_bits)
    restored = dequantize_block(quantize_block(blocks, precision, axis), precision, axis, 64, torch.float16)
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.5, 1e-30])
def test_equal_elements_come_back_as_they_were(constant: float, bits: int, scale_bits: int) -> None:
    block = torch.full((BLOCK_TOKENS, 16), constant)
    for axis in Axis:
        precision = Precision(bits, 16, scale_bits)
        restored = dequantize_block(quantize_block(block, precision, axis), precision, axis, 16, torch.float32)
        torch.testing.assert_close(restored, block, rtol=0, atol=1e-6)


def test_without_a_scale_codes_are_zero() -> None:
    block = torch.full((BLOCK_TOKENS, 16), 1e-30)
    assert not quantize_block(block, Precision(2, 16), Axis.TOKENS).any()
