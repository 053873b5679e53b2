"""The multiple-choice knapsack: pick one option of every item, least total loss, total cost within a capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import numpy.typing

# Cost units the dynamic programme tells apart. Beyond this, costs are rounded up to coarser units: 80 layers with
# 12 options for keys and for values then take about a second and 160 MB.
CAPACITY_UNITS = 1_000_000


@dataclass(frozen=True)
class Option:
    """One way to store an item: its cost, in whole units, and the loss it brings. `index` is the caller's."""

    index: int
    cost: int
    loss: float


def choose(items: Sequence[Sequence[tuple[int, float]]], capacity: int) -> tuple[int, ...]:
    """The index of the option chosen for every item.

    items: the (cost, loss) options of each item; costs are whole numbers, losses finite.
    capacity: the most that the chosen options may cost together; at least the sum of the cheapest.

    The choice is optimal, and the cheapest of the optimal ones, where costs less the item's cheapest span at most
    CAPACITY_UNITS multiples of their common divisor. Otherwise it is optimal for costs rounded up to coarser units.
    """
    frontiers = [pareto_frontier(options) for options in items]
    slack = capacity - sum(frontier[0].cost for frontier in frontiers)
    if slack < 0:
        raise ValueError("the capacity is less than the cheapest options cost")
    if slack >= sum(frontier[-1].cost - frontier[0].cost for frontier in frontiers):
        return tuple(frontier[-1].index for frontier in frontiers)
    extra_costs = [[option.cost - frontier[0].cost for option in frontier] for frontier in frontiers]
    unit = math.gcd(*(cost for costs in extra_costs for cost in costs))
    unit *= max(1, -(-slack // (unit * CAPACITY_UNITS)))
    in_units = [[-(-cost // unit) for cost in costs] for costs in extra_costs]
    losses = [[option.loss for option in frontier] for frontier in frontiers]
    chosen = _dynamic_programme(in_units, losses, slack // unit)
    return tuple(frontier[position].index for frontier, position in zip(frontiers, chosen, strict=True))


def pareto_frontier(options: Sequence[tuple[int, float]]) -> list[Option]:
    """The options that no other one beats or equals in both cost and loss: costs rise, losses fall."""
    frontier: list[Option] = []
    for cost, loss, index in sorted((cost, loss, index) for index, (cost, loss) in enumerate(options)):
        if not frontier or loss < frontier[-1].loss:
            frontier.append(Option(index, cost, loss))
    return frontier


def _dynamic_programme(costs: list[list[int]], losses: list[list[float]], capacity: int) -> list[int]:
    """Positions of the chosen options; each item's first option costs 0."""
    # least[c]: the least loss of the items so far when they cost exactly c.
    least = numpy.full(capacity + 1, numpy.inf)
    least[0] = 0.0
    reach = 0
    decisions: list[numpy.typing.NDArray[numpy.unsignedinteger]] = []
    for item_costs, item_losses in zip(costs, losses, strict=True):
        before = least[: reach + 1].copy()
        reach = min(capacity, reach + item_costs[-1])
        least[: before.size] += item_losses[0]
        decision = numpy.zeros(reach + 1, dtype=numpy.min_scalar_type(len(item_costs)))
        for position in range(1, len(item_costs)):
            cost = item_costs[position]
            if cost > capacity:
                break
            candidate = before[: reach + 1 - cost] + item_losses[position]
            window = slice(cost, cost + candidate.size)
            better = candidate < least[window]
            numpy.copyto(least[window], candidate, where=better)
            numpy.copyto(decision[window], position, where=better)
        decisions.append(decision)
    cost = int(numpy.argmin(least))  # the first, thus the cheapest
    chosen: list[int] = []
    for decision, item_costs in zip(reversed(decisions), reversed(costs), strict=True):
        position = int(decision[cost])
        chosen.append(position)
        cost -= item_costs[position]
    return chosen[::-1]
