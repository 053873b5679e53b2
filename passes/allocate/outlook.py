"""Outlook: what a plan is predicted to lose, what it leaves unquantized since it would lose too much, and whether it
saves anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.allocate.policies import UNQUANTIZED, BudgetError, SiteImportance

# Nats a token that are worth a word: at the default budget all layers of SmolLM2-135M together lose 0.004.
TELLING_LOSS = 0.05
# Nats a token beyond which the model is no longer itself: perplexity is 1.6 times as large.
RUINOUS_LOSS = 0.5


def left_unquantized(sites: Sequence[SiteImportance], plan: Plan) -> list[str]:
    """A sentence for each site's keys or values that keep 16 bits since any fewer would lose much."""
    return [
        f"{layer}: its {what} stay at 16 bits, as quantized at all they would lose {least:.2g} nats a token"
        for layer, what, precision, losses in _sides(sites, plan)
        if precision == UNQUANTIZED and (least := _least_quantized(losses)) > TELLING_LOSS
    ]


def ruined(sites: Sequence[SiteImportance], plan: Plan) -> list[str]:
    """As many sentences for those that are predicted to lose RUINOUS_LOSS or more as planned, the worst first."""
    sides = [
        (losses.get(precision, 0.0), layer, what, precision) for layer, what, precision, losses in _sides(sites, plan)
    ]
    return [
        f"{layer}: its {what} at {precision.mean_bits:g} bits are predicted to lose {loss:.2g} nats a token"
        for loss, layer, what, precision in sorted(sides, key=lambda side: -side[0])
        if loss >= RUINOUS_LOSS
    ]


def wider_than(own: float, tokens: int, plan: Plan, dtypes: Sequence[torch.dtype], name: str) -> list[str]:
    """A sentence where a plan is for more numbers a token than the model's own cache holds; else none.

    own: bytes that the model's own cache takes for a token of a text of `tokens`. dtypes: of each site in the model.

    Raises BudgetError where the plan takes more bytes than that.
    """
    unquantized = replace(plan, sites=tuple(site.unquantized() for site in plan.sites))
    planned, numbers = (each.token_bytes(dtypes, tokens) for each in (plan, unquantized))
    if planned > own:
        raise BudgetError(
            f"{name} keeps {own:.0f} bytes a token in its own cache, in which there are fewer numbers than its "
            f"attention has keys and values, and this plan {planned:.0f}: use the model as it is, or a budget that "
            f"needs less (storage_budget below {plan.storage_bits * own / planned:.2g})"
        )
    if numbers <= own:
        return []
    return [
        f"its own cache holds {own:.0f} bytes a token: the keys and values that are quantized here are "
        f"{numbers / own:.2g} times as many numbers, and only {own / planned:.2g} times fewer bytes are left"
    ]


def _sides(
    sites: Sequence[SiteImportance], plan: Plan
) -> Iterator[tuple[str, str, Precision, Mapping[Precision, float]]]:
    for site, planned in zip(sites, plan.sites, strict=True):
        yield site.layer, "keys", planned.key, site.key_sensitivity
        yield site.layer, "values", planned.value, site.value_sensitivity


def _least_quantized(losses: Mapping[Precision, float]) -> float:
    return min((loss for precision, loss in losses.items() if precision.is_quantized), default=0.0)
