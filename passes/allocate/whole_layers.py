"""Whole layers: which layers of a serving engine keep a float format, and which stay at 16 bits.

Engines take one format for the keys and values of a layer, or none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmix_compile.kernels.format.floats import FP8, NVFP4, FloatFormat
from kvmix_compile.kernels.format.precision import UNQUANTIZED_BITS
from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.kernels.format.state import held_blocks
from kvmix_compile.passes.allocate.knapsack import choose
from kvmix_compile.passes.allocate.policies import BUDGET_ROUNDING, AllocationError, Budget, BudgetError, Unit


@dataclass(frozen=True)
class CacheFormat:
    """How a layer keeps its keys and values. name: Model-Optimizer's, in lower case."""

    name: str
    key: FloatFormat
    value: FloatFormat

    def fits(self, shape: SiteShape) -> bool:
        """Whether heads of these sizes can be kept like this."""
        return self.key.fits(shape.key_dim) and self.value.fits(shape.value_dim)

    def token_bits(self, shape: SiteShape, unit: Unit) -> int:
        """Bits of a token's keys and values."""
        pairs = ((self.key, shape.key_dim), (self.value, shape.value_dim))
        bits = sum(dim * (side.bits if unit == "budget" else side.stored_bits) for side, dim in pairs)
        return round(shape.kv_heads * bits)


FORMATS: Mapping[str, CacheFormat] = {
    each.name: each
    for each in (
        CacheFormat("fp8", FP8, FP8),
        CacheFormat("nvfp4", NVFP4, NVFP4),
        CacheFormat("fp8_k_nvfp4_v", FP8, NVFP4),
    )
}


@dataclass(frozen=True)
class LayerLosses(Shaped):
    """What was measured of the keys and values that one layer keeps.

    layers: the name of its attention, and of later ones that read what it keeps.
    key_losses, value_losses: of each float format that fits, the predicted rise of the loss in nats a token.
    key_scale, value_scale: by which all elements are divided before they are rounded.
    """

    layers: tuple[str, ...]
    shape: SiteShape
    key_losses: Mapping[FloatFormat, float]
    value_losses: Mapping[FloatFormat, float]
    key_scale: float = 1.0
    value_scale: float = 1.0

    def loss(self, kept: CacheFormat | None) -> float:
        """Of the layer, its keys and values together; None: 16 bits, which lose nothing."""
        return 0.0 if kept is None else self.key_losses[kept.key] + self.value_losses[kept.value]


def held_bits(layer: Shaped, kept: CacheFormat | None, unit: Unit, context: int) -> int:
    """Bits that a layer holds of a text of `context` tokens, in a format or at 16 bits (None), in a common measure: one
    with a sliding window holds few. context: 0: of any text, all layers counting alike.
    """
    elements = layer.key_elements + layer.value_elements
    token = UNQUANTIZED_BITS * elements if kept is None else kept.token_bits(layer.shape, unit)
    return held_blocks(layer.window, context) * token


Choice = tuple[CacheFormat | None, ...]


def within_loss(sites: Sequence[LayerLosses], kept: CacheFormat, most: float, context: int = 0) -> Choice:
    """As few bits as lose `most` nats a token in all: beginning with those layers that lose most for the bits that they
    save, layers stay at 16 bits until what the others lose is no more.

    Raises AllocationError where the format fits no layer.
    """
    choice: list[CacheFormat | None] = [kept if kept.fits(site.shape) else None for site in sites]
    _check_any(sites, [kept])

    def loss_of_bits(index: int) -> float:
        held, less = (held_bits(sites[index], each, "budget", context) for each in (None, kept))
        return sites[index].loss(kept) / (held - less)

    worst_first = sorted((index for index, format in enumerate(choice) if format), key=loss_of_bits, reverse=True)
    for index in worst_first:
        if total_loss(sites, choice) <= most:
            break
        choice[index] = None
    return tuple(choice)


def within_budget(sites: Sequence[LayerLosses], formats: Sequence[CacheFormat], budget: Budget, context: int) -> Choice:
    """The format of each layer that loses least in all, at no more bits an element than the budget's.

    Raises BudgetError where these formats take more, AllocationError where none fits any layer.
    """
    _check_any(sites, formats)
    fitting = [[None, *(each for each in formats if each.fits(site.shape))] for site in sites]
    options = [
        [(held_bits(site, kept, budget.unit, context), site.loss(kept)) for kept in own]
        for site, own in zip(sites, fitting, strict=True)
    ]
    elements = sum(held_bits(site, None, budget.unit, context) for site in sites) / UNQUANTIZED_BITS
    capacity = math.floor(budget.bits * elements * (1 + BUDGET_ROUNDING))
    least = sum(min(bits for bits, _ in own) for own in options)
    if capacity < least:
        raise BudgetError(
            f"{budget.unit}={budget.bits:g} cannot be met: with every layer that can be in "
            f"{' or '.join(each.name for each in formats)}, {budget.meaning} average {least / elements:g} an element; "
            "give that or more, or formats of fewer bits"
        )
    return tuple(own[index] for own, index in zip(fitting, choose(options, capacity), strict=True))


def total_loss(sites: Sequence[LayerLosses], choice: Sequence[CacheFormat | None]) -> float:
    """What a choice is predicted to lose, in nats a token."""
    return sum(site.loss(kept) for site, kept in zip(sites, choice, strict=True))


def _check_any(sites: Sequence[LayerLosses], formats: Sequence[CacheFormat]) -> None:
    if not any(each.fits(site.shape) for each in formats for site in sites):
        dims = sorted({dim for site in sites for dim in (site.key_dim, site.value_dim)})
        raise AllocationError(
            f"no layer can be kept in {' or '.join(each.name for each in formats)}, which takes heads of a multiple of "
            f"{NVFP4.block} channels, not of {' and '.join(map(str, dims))}: choose fp8"
        )
