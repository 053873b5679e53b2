"""Floats: the small floating-point formats in which serving engines keep keys and values, as they are read back.

Nothing is stored in them here: they are rounded to, so that what they lose can be measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# OCP 8-bit floating point, E4M3: its largest number.
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
# OCP microscaling formats, E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
E2M1_MAX = 6.0
# NVFP4: so many channels share a scale, which is an E4M3 number.
NVFP4_BLOCK = 16


@dataclass(frozen=True)
class FloatFormat:
    """Of keys or of values.

    name: as NVIDIA's Model-Optimizer and vLLM write it, in lower case.
    bits: of an element. block: channels that share a scale of 8 bits; 0: no scale but the tensor's.
    """

    name: str
    bits: int
    block: int = 0

    @property
    def stored_bits(self) -> float:
        """Bits of an element, its share of a block's scale included."""
        return self.bits + (8 / self.block if self.block else 0)

    def fits(self, dim: int) -> bool:
        """Whether heads of so many channels can be stored like this."""
        return not self.block or dim % self.block == 0

    def as_stored(self, elements: Tensor, scale: float = 1.0) -> Tensor:
        """What float32 elements `[..., dim]` are read back as. scale: the whole tensor's, by which they are divided."""
        scaled = elements / scale
        return (_in_blocks(scaled, self.block) if self.block else e4m3(scaled)) * scale


FP8 = FloatFormat("fp8", bits=8)
NVFP4 = FloatFormat("nvfp4", bits=4, block=NVFP4_BLOCK)


def fitting_scale(largest: float) -> float:
    """The scale that brings a tensor's largest element to E4M3's, as Model-Optimizer calibrates either format."""
    return largest / E4M3_MAX if largest > 0 else 1.0


def e4m3(elements: Tensor) -> Tensor:
    """Rounded to the nearest E4M3 number; what lies beyond the largest becomes that."""
    return elements.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(elements.dtype)


def e2m1(elements: Tensor) -> Tensor:
    """Rounded to the nearest E2M1 number, ties to the even one; what lies beyond the largest becomes that."""
    size = elements.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round() * step * elements.sign()


def _in_blocks(elements: Tensor, block: int) -> Tensor:
    blocks = elements.unflatten(-1, (-1, block))
    scale = e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)
    # Where a scale is too small for E4M3, the block is read back as zeros.
    return (e2m1(torch.where(scale == 0, 0, blocks / scale)) * scale).flatten(-2)
