"""Sensitivity: the precisions to choose from, and what each would lose."""

from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from kvmix_compile.kernels.packing import dequantize_block, quantize_block
from kvmix_compile.kernels.precision import BLOCK_TOKENS, CHANNEL_MULTIPLE, Axis, Precision
from kvmix_compile.passes.allocate import PUBLISHED_GROUP

# What fisher chooses from. 4-bit scales cost SmolLM2-135M 0.1 of perplexity and save 0.7 bits an element.
CANDIDATE_BITS = (2, 3, 4, 8)
# (important, other) bits of keys whose channels are not all kept alike. Some channels matter far more than others, and
# which ones hardly changes from text to text.
CANDIDATE_HALVES = ((3, 2), (4, 2), (4, 3), (8, 4))
# Small groups are cheap with 4-bit scales: 0.5 bits an element in groups of 16, 0.28 in groups of 32. Keys cannot have
# larger groups than a block has tokens. At 8 bits the group hardly matters.
KEY_GROUPS = (16, 32)
VALUE_GROUPS = (16, 32, 64)
CANDIDATE_SCALE_BITS = 4


@dataclass
class Tally:
    """Sums over calibration rows for the keys or the values of one site."""

    candidates: tuple[Precision, ...]
    axis: Axis
    gradient_norm: float = 0.0
    # Of each candidate, what each channel of each head loses: [heads, dim].
    sensitivity: dict[Precision, Tensor] = field(default_factory=dict)

    def add_sensitivity(self, values: Tensor, slope: Tensor, sinks: int, predictions: int) -> None:
        """Add one row: `values` `[kv_heads, tokens, dim]`, of which the first `sinks` tokens are not quantized, and the
        gradient of the summed loss of so many `predictions` with respect to what is stored of them.
        """
        heads, tokens, dim = values.shape
        blocks = max(1, (tokens - sinks) // BLOCK_TOKENS)
        quantized = slice(tokens - blocks * BLOCK_TOKENS, None)
        shape = (heads, blocks, BLOCK_TOKENS, dim)
        original, slope = values[:, quantized].reshape(shape).float(), slope[:, quantized].reshape(shape)
        for candidate in self.candidates:
            packed = quantize_block(original, candidate, self.axis)
            error = dequantize_block(packed, candidate, self.axis, dim, torch.float32) - original
            loss = 0.5 * (slope * error).square().sum((1, 2)).double() / predictions
            self.sensitivity[candidate] = self.sensitivity.get(candidate, 0) + loss

    def losses(self, rows: int) -> dict[Precision, float]:
        """The mean over so many rows of what each candidate loses."""
        return {candidate: loss.sum().item() / rows for candidate, loss in self.sensitivity.items()}

    def important_half(self) -> Tensor:
        """The half of each head's channels that would lose most at the poorest candidate, bool `[heads, dim]`."""
        poorest = max(self.sensitivity.values(), key=lambda loss: loss.sum().item())
        ranks = poorest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return ranks < poorest.shape[-1] // 2

    def losses_of_halves(self, important: Tensor, rows: int) -> dict[Precision, float]:
        """As losses, of candidates that have more bits in the `important` channels, bool `[heads, dim]`."""
        losses = {}
        groups = {candidate.group for candidate in self.sensitivity}
        for (important_bits, bits), group in product(CANDIDATE_HALVES, groups):
            rich, poor = (Precision(width, group, CANDIDATE_SCALE_BITS) for width in (important_bits, bits))
            if rich in self.sensitivity and poor in self.sensitivity:
                loss = torch.where(important, self.sensitivity[rich], self.sensitivity[poor])
                losses[replace(poor, important_bits=important_bits)] = loss.sum().item() / rows
        return losses


def can_be_halved(dim: int) -> bool:
    """Whether half the channels of keys with `dim` elements a head can have more bits than the others."""
    return dim % (2 * CHANNEL_MULTIPLE) == 0


def candidates_for(dim: int, axis: Axis) -> tuple[Precision, ...]:
    """The precisions to choose from for keys or values with `dim` elements a head, 16 bits included.

    Those alone where `dim` is no multiple of 8, which cannot be packed.
    """
    if dim % CHANNEL_MULTIPLE:
        return (Precision(16),)
    groups = [group for group in (KEY_GROUPS if axis == Axis.TOKENS else VALUE_GROUPS) if _fits(group, dim, axis)]
    groups = groups or [max(group for group in range(1, PUBLISHED_GROUP + 1) if dim % group == 0)]
    usual = max(group for group in groups if group <= PUBLISHED_GROUP)
    quantized = tuple(
        Precision(bits, group, CANDIDATE_SCALE_BITS)
        for bits in CANDIDATE_BITS
        for group in groups
        if bits < 8 or group == usual
    )
    return (*quantized, Precision(16))


def _fits(group: int, dim: int, axis: Axis) -> bool:
    return axis == Axis.TOKENS or dim % group == 0
