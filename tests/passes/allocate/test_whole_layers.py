"""Which layers stay at 16 bits: the ones that lose most for the bits that they save, and no more than needed."""

from itertools import product

import pytest

from kvmix_compile.kernels.format.floats import FP8, NVFP4
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.policies import AllocationError, Budget, BudgetError
from kvmix_compile.passes.allocate.whole_layers import (
    FORMATS,
    LayerLosses,
    held_bits,
    total_loss,
    within_budget,
    within_loss,
)

EIGHT, FOUR, BOTH = FORMATS["fp8"], FORMATS["nvfp4"], FORMATS["fp8_k_nvfp4_v"]
SHAPE = SiteShape(2, 32, 32)


def layer(number: int, keys: float, values: float = 0.0, shape: SiteShape = SHAPE) -> LayerLosses:
    """One that loses ten times as much in four bits."""
    return LayerLosses(
        (f"layers.{number}.attn",), shape, {FP8: keys, NVFP4: 10 * keys}, {FP8: values, NVFP4: 10 * values}
    )


LAYERS = [layer(number, loss) for number, loss in enumerate((0.02, 0.001, 0.03, 0.002))]


def test_the_fewest_layers_are_skipped_that_bring_the_loss_below() -> None:
    assert within_loss(LAYERS, EIGHT, most=1.0) == (EIGHT,) * 4
    assert within_loss(LAYERS, EIGHT, most=0.025) == (EIGHT, EIGHT, None, EIGHT)
    assert within_loss(LAYERS, EIGHT, most=0.003) == (None, EIGHT, None, EIGHT)
    assert within_loss(LAYERS, EIGHT, most=0.0) == (None,) * 4


def test_layers_that_hold_much_are_kept_before_those_that_hold_little() -> None:
    large, small = SiteShape(8, 32, 32), SiteShape(1, 32, 32)
    layers = [layer(0, 0.02, shape=large), layer(1, 0.01, shape=small)]
    assert within_loss(layers, EIGHT, most=0.02) == (EIGHT, None)
    windowed = [layer(0, 0.02), layer(1, 0.01, shape=SiteShape(2, 32, 32, window=64))]
    assert within_loss(windowed, EIGHT, most=0.02, context=8192) == (EIGHT, None)
    assert within_loss(windowed, EIGHT, most=0.02) == (None, EIGHT)


@pytest.mark.parametrize("formats", [(EIGHT,), (FOUR,), (EIGHT, FOUR), (EIGHT, FOUR, BOTH)])
@pytest.mark.parametrize("bits", [9.0, 10.5, 13.9, 16.0])
def test_a_budget_is_spent_where_it_loses_least(formats: tuple, bits: float) -> None:
    layers = [layer(0, 0.02, 0.001), layer(1, 0.001, 0.02), layer(2, 0.03), layer(3, 0.002)]
    found = within_budget(layers, formats, Budget(bits, "budget"), context=0)
    most = bits * sum(held_bits(each, None, "budget", 0) for each in layers) / 16

    def cost(choice: tuple) -> int:
        return sum(held_bits(each, kept, "budget", 0) for each, kept in zip(layers, choice, strict=True))

    affordable = [choice for choice in product((None, *formats), repeat=4) if cost(choice) <= most]
    assert cost(found) <= most
    assert total_loss(layers, found) == min(total_loss(layers, choice) for choice in affordable)


def test_scales_count_in_a_storage_budget_alone() -> None:
    assert within_budget(LAYERS, [FOUR], Budget(4.0, "budget"), 0) == (FOUR,) * 4
    assert within_budget(LAYERS, [FOUR], Budget(4.5, "storage_budget"), 0) == (FOUR,) * 4
    with pytest.raises(BudgetError, match=r"storage_budget=4\.4 cannot be met: .* in nvfp4, .* average 4\.5"):
        within_budget(LAYERS, [FOUR], Budget(4.4, "storage_budget"), 0)


def test_layers_that_a_format_does_not_fit_stay_at_16_bits() -> None:
    odd = SiteShape(2, 24, 24)
    layers = [LAYERS[0], LayerLosses(("layers.1.attn",), odd, {FP8: 0.001}, {FP8: 0.001})]
    assert within_loss(layers, FOUR, most=1.0) == (FOUR, None)
    assert within_budget(layers, [FOUR], Budget(12.0, "budget"), 0) == (FOUR, None)
    with pytest.raises(AllocationError, match="no layer can be kept in nvfp4, .* multiple of 16 channels, not of 24"):
        within_loss(layers[1:], FOUR, most=1.0)
    with pytest.raises(AllocationError, match="no layer can be kept in nvfp4"):
        within_budget(layers[1:], [FOUR], Budget(12.0, "budget"), 0)
