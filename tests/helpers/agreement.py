"""Agreement: whether two states hold the same keys and values, which two different computations made.

Equal inputs give equal bytes, and a test may ask for them. Where two graphs, two shapes or two processors computed
the keys, they differ by rounding, and where one lies between two codes, rounding decides.
"""

import torch
from torch import Tensor

from kvmix_compile.kernels.format.packing import dequantize_block
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.state import SiteState, StateLayout

TOLERANCE = 1e-4


def assert_states_agree(found: SiteState, expected: SiteState, layout: StateLayout) -> None:
    """What is unquantized agrees up to rounding, and each quantized element up to one step of its group."""
    dtype = found.dtype
    # Where a number lies between two of the dtype's, rounding decides, too.
    tolerance = max(TOLERANCE, torch.finfo(dtype).eps)
    for name in ("sink_k", "sink_v", "recent_k", "recent_v"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=TOLERANCE, rtol=tolerance)
    for name, precision, axis, head_dim in (
        ("packed_k", layout.key, Axis.TOKENS, layout.key_dim),
        ("packed_v", layout.value, Axis.CHANNELS, layout.value_dim),
    ):
        packed = [getattr(state, name) for state in (found, expected)]
        read_in = torch.float32 if precision.is_quantized else dtype
        one, other = (dequantize_block(blocks, precision, axis, head_dim, read_in) for blocks in packed)
        steps = [_steps(blocks, precision, axis, head_dim) for blocks in packed]
        excess = (one - other).abs() - torch.maximum(*steps) * (1 + TOLERANCE)
        assert excess.numel() == 0 or excess.max() <= TOLERANCE, f"{name} is more than a step off, by {excess.max()}"


def _steps(packed: Tensor, precision: Precision, axis: Axis, head_dim: int) -> Tensor:
    """What one step of each element's code is worth, `[.., 32, head_dim]`: read off the block with its lowest codes and
    with its highest in the place of its own.
    """
    if not precision.is_quantized:
        return packed.new_zeros(1, dtype=torch.float32)
    if precision.important_bits:
        parts = precision.parts(head_dim)
        pieces = packed.split([part.precision.block_bytes(part.channels, 4) for part in parts], dim=-1)
        return torch.cat(
            [_steps(piece, part.precision, axis, part.channels) for piece, part in zip(pieces, parts, strict=True)], -1
        )
    codes = precision.code_bytes(head_dim)
    lowest, highest = (
        dequantize_block(torch.cat((torch.full_like(packed[..., :codes], fill), packed[..., codes:]), -1),
                         precision, axis, head_dim, torch.float32)
        for fill in (0, 255)
    )  # fmt: skip
    return (highest - lowest) / precision.levels
