"""Allocation: from what the quantization of each site would cost in loss, and a budget of bits, to precisions."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, CHANNEL_MULTIPLE, UNQUANTIZED_BITS, Axis, Precision
from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.kernels.format.state import held_blocks
from kvmix_compile.passes.allocate.knapsack import choose

Policy = Literal["fisher", "kvmix", "uniform"]
Unit = Literal["budget", "storage_budget"]
Allocation = tuple[tuple[Precision, Precision], ...]

# KVmix (arXiv 2506.08018, AAAI 2026), allocation: the layers that matter most, and all others.
KVMIX_IMPORTANT_KEY_BITS = 3
KVMIX_IMPORTANT_VALUE_BITS = 4
KVMIX_OTHER_BITS = 2
# Group size of KVmix and of KIVI (arXiv 2402.02750).
PUBLISHED_GROUP = 32
# (key bits, value bits) from poor to rich. Keys are at least as rich as values and at most one step richer: on
# SmolLM2-135M at 2.5 code bits, 3-bit keys with 2-bit values have a perplexity of 20.89, the reverse 22.78.
UNIFORM_BITS = (
    (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16),
)  # fmt: skip
# Bits an element that scales and zero points may take beside a budget of code bits. Published groups, with 16-bit
# scales, take 1; groups of 32 with 4-bit scales take 0.28 and groups of 16 take 0.53, which go where they gain most.
SCALE_ALLOWANCE = 0.35
# Budgets are decimal fractions such as 2.3: a plan that exceeds one by less than this fraction of it meets it.
BUDGET_ROUNDING = 1e-9
# Unquantized elements count as 16 bits, whatever the model's dtype.
UNQUANTIZED_BYTES = 2
UNQUANTIZED = Precision(UNQUANTIZED_BITS)


class AllocationError(KVMixError):
    """Importances, a policy or a budget that no allocation can be made from."""


class BudgetError(AllocationError):
    """A budget outside what the policy can reach."""


@dataclass(frozen=True)
class SiteImportance(Shaped):
    """What is known about one attention site when bits are allocated.

    layer: name of the site in the model.
    key_gradient_norm, value_gradient_norm: s_k and s_v of KVmix, the L2 norms of the loss's gradients with respect to
        the weights of the key and the value projection.
    key_sensitivity, value_sensitivity: the candidate precisions, each with the increase of the loss (nats a token)
        that is predicted when the keys or values are stored at it; 0.0 at 16 bits.
    channel_tiers: the tiers of each key head's channels that key precisions with important_bits tell apart, as
        in SitePlan; empty where no candidate has such.
    key_exponents, value_exponents: as in SitePlan.
    blocks: of 32 tokens that it holds in a text of the length that a budget is for: how much its bits count. A site
        with a sliding window holds few of a long text, and bits spent on it cost little.
    """

    layer: str
    shape: SiteShape
    key_gradient_norm: float
    value_gradient_norm: float
    key_sensitivity: Mapping[Precision, float]
    value_sensitivity: Mapping[Precision, float]
    channel_tiers: tuple[str, ...] = ()
    key_exponents: tuple[int, ...] = ()
    value_exponents: tuple[int, ...] = ()
    blocks: int = 1

    def in_context(self, context: int) -> SiteImportance:
        """The same for a budget of texts of so many tokens; 0: of any, all sites counting alike."""
        return replace(self, blocks=held_blocks(self.window, context))


@dataclass(frozen=True)
class Budget:
    """A mean number of bits an element, in one of the two units.

    bits: the most that the mean over all cached elements may be.
    unit: the name of the argument, "budget" or "storage_budget".
    """

    bits: float
    unit: Unit

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, Real):
            raise AllocationError(f"{self.unit} is a number of bits an element, such as 2.3, not {self.bits!r}")
        if not 0 < self.bits <= UNQUANTIZED_BITS:
            raise BudgetError(
                f"{self.unit} must be a positive number of bits an element, {UNQUANTIZED_BITS} (nothing quantized) at "
                f"most, not {self.bits:g}"
            )

    @property
    def meaning(self) -> str:
        """What the bits are."""
        return "code bits" if self.unit == "budget" else "stored bits (scales and zero points included)"

    def cost(self, precision: Precision, head_dim: int) -> int:
        """Bits that a block of 32 tokens of one head costs in this unit."""
        return _cost(precision, head_dim, self.unit)

    def capacity(self, sites: Sequence[SiteImportance]) -> int:
        """Bits that all blocks of all heads of all sites may cost."""
        return math.floor(self.bits * _block_elements(sites) * (1 + BUDGET_ROUNDING))

    def check_reachable(self, sites: Sequence[SiteImportance], lowest: int, highest: int, advice: str = "") -> None:
        """Raise BudgetError where the capacity is below `lowest`, the cost of the cheapest allocation."""
        if self.capacity(sites) < lowest:
            raise self.out_of_reach(sites, lowest, highest, advice)

    def out_of_reach(self, sites: Sequence[SiteImportance], lowest: int, highest: int, advice: str = "") -> BudgetError:
        """The error that names the reachable range; `lowest` and `highest` are costs."""
        elements = _block_elements(sites)
        # Rounded outwards at the low end, so that the number printed is itself reachable.
        low, high = math.ceil(lowest / elements * 1e4 - 1e-6) / 1e4, math.floor(highest / elements * 1e4 + 1e-6) / 1e4
        return BudgetError(
            f"{self.unit}={self.bits:g} cannot be met: {self.meaning} per cached element can average {low:g} to "
            f"{high:g} here{advice}{_unpackable(sites)}"
        )


def allocate(
    sites: Sequence[SiteImportance],
    *,
    policy: Policy = "fisher",
    budget: float | None = None,
    storage_budget: float | None = None,
) -> Allocation:
    """The precision of keys and of values, for every site.

    policy:
        "fisher": the candidates with the least total sensitivity; the optimum.
        "kvmix": the published method. The sites with the largest key gradient norms get 3-bit keys, as many with the
            largest value gradient norms get 4-bit values, everything else 2 bits; as many as fit.
        "uniform": the same bits everywhere, groups of 32, 16-bit scales and zero points (KIVI's recipe).
    budget: the most code bits a cached element, averaged over the elements of all keys and values.
    storage_budget: the same with all that is stored counted: codes, scales, zero points. One of the two is given.

    Raises BudgetError where the policy cannot meet the budget, AllocationError on other bad input.
    """
    check_policy(policy)
    asked = limit(budget, storage_budget)
    if not sites:
        raise AllocationError("there is no attention site to allocate bits to")
    allocation = POLICIES[policy](sites, asked)
    for site, (key, value) in zip(sites, allocation, strict=True):
        _check_storable(site, key, value)
    return allocation


def check_policy(policy: object) -> None:
    """Raise AllocationError unless there is such a policy."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise AllocationError(f"there is no policy {policy!r}; choose one of {', '.join(POLICIES)}")


def limit(budget: float | None, storage_budget: float | None) -> Budget:
    """Whichever of the two is given. Raises AllocationError unless one is, BudgetError where it is out of range."""
    if budget is not None and storage_budget is None:
        return Budget(budget, "budget")
    if storage_budget is not None and budget is None:
        return Budget(storage_budget, "storage_budget")
    raise AllocationError("give either budget (code bits an element) or storage_budget (all bits stored for one)")


def _unpackable(sites: Sequence[SiteImportance]) -> str:
    """Why a budget is out of reach, where heads are: half a sentence, or nothing."""
    channels = sorted({dim for site in sites for dim in (site.key_dim, site.value_dim) if dim % CHANNEL_MULTIPLE})
    if not channels:
        return ""
    return (
        f", as heads of {' and '.join(map(str, channels))} channels stay at {UNQUANTIZED_BITS} bits (only multiples of "
        f"{CHANNEL_MULTIPLE} can be quantized): budget={UNQUANTIZED_BITS} keeps everything as it is"
    )


def _allocate_fisher(sites: Sequence[SiteImportance], budget: Budget) -> Allocation:
    _check_sensitivities(sites)
    # Where calibration read nothing of a site from storage, no loss is predicted at any precision, and the cheapest
    # would do: it must not where there is room for the elements themselves.
    untouched: Allocation = ((UNQUANTIZED, UNQUANTIZED),) * len(sites)
    if _is_lossless(sites) and _total_cost(sites, untouched, budget) <= budget.capacity(sites):
        return untouched
    items = [
        _Item(site.kv_heads * site.blocks, head_dim, sensitivity)
        for site in sites
        for head_dim, sensitivity in (
            (site.key_dim, site.key_sensitivity),
            (site.value_dim, site.value_sensitivity),
        )
    ]
    # Code bits leave scales uncounted, so that small groups would be free: there bits come first, in published groups.
    by_bits = items if budget.unit == "storage_budget" else [item.in_published_groups() for item in items]
    costs = [item.costs(budget.unit) for item in by_bits]
    budget.check_reachable(sites, sum(map(min, costs)), sum(map(max, costs)))
    chosen = _least_loss(by_bits, budget.unit, budget.capacity(sites))
    if budget.unit == "budget":
        chosen = _regrouped(items, chosen, math.floor(SCALE_ALLOWANCE * _block_elements(sites)))
    return tuple(zip(chosen[::2], chosen[1::2], strict=True))


def _is_lossless(sites: Sequence[SiteImportance]) -> bool:
    """Whether all keys and values can stay unquantized, and lose nothing so."""
    return all(site.key_sensitivity.get(UNQUANTIZED) == site.value_sensitivity.get(UNQUANTIZED) == 0 for site in sites)


@dataclass(frozen=True)
class _Item:
    """The keys or the values of one site: the blocks of all heads, and what each precision would lose."""

    blocks: int
    head_dim: int
    sensitivity: Mapping[Precision, float]

    def cost(self, precision: Precision, unit: Unit) -> int:
        """Bits of all blocks."""
        return self.blocks * _cost(precision, self.head_dim, unit)

    def costs(self, unit: Unit) -> list[int]:
        """Of each precision."""
        return [self.cost(precision, unit) for precision in self.sensitivity]

    def only(self, wanted: Callable[[Precision], bool]) -> _Item:
        """With fewer precisions to choose from."""
        return replace(self, sensitivity={choice: loss for choice, loss in self.sensitivity.items() if wanted(choice)})

    def with_bits(self, tiers: tuple[int, ...]) -> _Item:
        """These bits in every group size."""
        return self.only(lambda precision: precision.tiers == tiers)

    def in_published_groups(self) -> _Item:
        """Each choice of bits in one group size, the published one or the largest below it."""
        groups: dict[tuple[int, ...], int] = {}
        for precision in sorted(self.sensitivity, key=lambda precision: precision.group):
            if precision.group <= PUBLISHED_GROUP or precision.tiers not in groups:
                groups[precision.tiers] = precision.group
        return self.only(lambda precision: precision.group == groups[precision.tiers])


def _least_loss(items: Sequence[_Item], unit: Unit, capacity: int) -> list[Precision]:
    """A precision for each item: those of least total loss that cost no more than the capacity."""
    options = [list(zip(item.costs(unit), item.sensitivity.values(), strict=True)) for item in items]
    chosen = choose(options, capacity)
    return [list(item.sensitivity)[index] for index, item in zip(chosen, items, strict=True)]


def _regrouped(items: Sequence[_Item], chosen: Sequence[Precision], allowance: int) -> list[Precision]:
    """The chosen bits in the groups that lose least. Scales and zero points may take `allowance` bits of all blocks, or
    what they take already if that is more.
    """
    pairs = list(zip(items, chosen, strict=True))
    codes, stored = (sum(item.cost(precision, unit) for item, precision in pairs) for unit in get_args(Unit))
    same_bits = [item.with_bits(precision.tiers) for item, precision in pairs]
    return _least_loss(same_bits, "storage_budget", max(codes + allowance, stored))


def _allocate_kvmix(sites: Sequence[SiteImportance], budget: Budget) -> Allocation:
    by_key = _ranked(sites, "key_gradient_norm")
    by_value = _ranked(sites, "value_gradient_norm")

    def with_important(count: int) -> Allocation:
        important_keys, important_values = set(by_key[:count]), set(by_value[:count])
        return tuple(
            (
                _published_key(KVMIX_IMPORTANT_KEY_BITS if index in important_keys else KVMIX_OTHER_BITS),
                _published_value(
                    KVMIX_IMPORTANT_VALUE_BITS if index in important_values else KVMIX_OTHER_BITS, site.value_dim
                ),
            )
            for index, site in enumerate(sites)
        )

    def cost(count: int) -> int:
        return _total_cost(sites, with_important(count), budget)

    lowest, highest = cost(0), cost(len(sites))
    # A budget above the highest mean, other than by rounding, would silently go unspent.
    above = budget.bits * _block_elements(sites) * (1 - BUDGET_ROUNDING) > highest
    if budget.capacity(sites) < lowest or above:
        raise budget.out_of_reach(sites, lowest, highest, " with policy 'kvmix'; policy 'fisher' reaches further")
    most_that_fit = bisect_right(range(len(sites) + 1), budget.capacity(sites), key=cost) - 1
    return with_important(most_that_fit)


def _allocate_uniform(sites: Sequence[SiteImportance], budget: Budget) -> Allocation:
    allocations: list[Allocation] = [
        tuple((_published_key(key_bits), _published_value(value_bits, site.value_dim)) for site in sites)
        for key_bits, value_bits in UNIFORM_BITS
    ]
    costs = [_total_cost(sites, allocation, budget) for allocation in allocations]
    budget.check_reachable(sites, min(costs), max(costs), " with policy 'uniform'")
    capacity = budget.capacity(sites)
    return [allocation for allocation, cost in zip(allocations, costs, strict=True) if cost <= capacity][-1]


POLICIES: Mapping[Policy, Callable[[Sequence[SiteImportance], Budget], Allocation]] = {
    "fisher": _allocate_fisher,
    "kvmix": _allocate_kvmix,
    "uniform": _allocate_uniform,
}


def _published_key(bits: int) -> Precision:
    return Precision(bits, PUBLISHED_GROUP, 16)


def _published_value(bits: int, head_dim: int) -> Precision:
    """Groups of values run along the head: of 32 elements, or the next smaller number that divides the head."""
    group = next(size for size in range(PUBLISHED_GROUP, 0, -1) if head_dim % size == 0)
    return Precision(bits, group, 16)


def _ranked(sites: Sequence[SiteImportance], norm: Literal["key_gradient_norm", "value_gradient_norm"]) -> list[int]:
    """Indices of the sites, the largest gradient norm first; of equal ones, the earlier site first."""
    for site in sites:
        if math.isnan(getattr(site, norm)):
            raise AllocationError(
                f"{norm} of {site.layer} is not known, as no linear map was recognised behind it: use policy='fisher', "
                "which needs none"
            )
        if not math.isfinite(getattr(site, norm)):
            raise AllocationError(f"{norm} of {site.layer} is {getattr(site, norm)}; calibrate on other texts")
    return sorted(range(len(sites)), key=lambda index: -getattr(sites[index], norm))


def _check_sensitivities(sites: Sequence[SiteImportance]) -> None:
    for site in sites:
        for what, sensitivity in (("keys", site.key_sensitivity), ("values", site.value_sensitivity)):
            if not sensitivity:
                raise AllocationError(f"no precision was measured for the {what} of {site.layer}")
            for precision, loss in sensitivity.items():
                if not math.isfinite(loss):
                    raise AllocationError(
                        f"the sensitivity of the {what} of {site.layer} to {precision} is {loss}; calibrate on other "
                        "texts"
                    )


def _check_storable(site: SiteImportance, key: Precision, value: Precision) -> None:
    try:
        key.check(site.key_dim, Axis.TOKENS)
        value.check(site.value_dim, Axis.CHANNELS)
    except KVMixError as error:
        raise AllocationError(f"{site.layer}: {error}, as policy 'fisher' does where the budget allows it") from error


def _cost(precision: Precision, head_dim: int, unit: Unit) -> int:
    """Bits of a block of 32 tokens of one head."""
    if unit == "budget":
        return round(precision.mean_bits * BLOCK_TOKENS * head_dim)
    return 8 * precision.block_bytes(head_dim, UNQUANTIZED_BYTES)


def _block_elements(sites: Sequence[SiteImportance]) -> int:
    """Elements of all blocks, keys and values of all sites."""
    return sum(BLOCK_TOKENS * site.blocks * site.kv_heads * (site.key_dim + site.value_dim) for site in sites)


def _total_cost(sites: Sequence[SiteImportance], allocation: Allocation, budget: Budget) -> int:
    return sum(
        site.blocks * site.kv_heads * (budget.cost(key, site.key_dim) + budget.cost(value, site.value_dim))
        for site, (key, value) in zip(sites, allocation, strict=True)
    )
