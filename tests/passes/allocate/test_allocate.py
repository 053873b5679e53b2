"""Allocation: the optimum under a budget, the published method, the uniform recipe, and budgets that cannot be met."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate import knapsack
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_compile.passes.allocate.policies import (
    SCALE_ALLOWANCE,
    Allocation,
    AllocationError,
    BudgetError,
    Policy,
    SiteImportance,
    allocate,
)
from kvmix_compile.passes.measure.importance import Importance

CANDIDATES = [
    *(Precision(bits, group, scale_bits) for bits in (2, 3, 4) for group in (16, 32) for scale_bits in (4, 16)),
    Precision(8),
    Precision(16),
]


def as_plan(sites: list[SiteImportance], allocation: Allocation) -> Plan:
    return Plan(
        sites=tuple(
            SitePlan(site.layer, site.shape, key, value) for site, (key, value) in zip(sites, allocation, strict=True)
        ),
        policy="any",
        fingerprint="any",
        sinks=0,
        recent=128,
    )


def total_sensitivity(sites: list[SiteImportance], allocation: Allocation) -> float:
    return sum(
        site.key_sensitivity[key] + site.value_sensitivity[value]
        for site, (key, value) in zip(sites, allocation, strict=True)
    )


def typical_sensitivity(weight: float) -> dict[Precision, float]:
    """Each bit quarters the squared error; smaller groups and finer scales help a little."""
    return {
        precision: weight * 4.0**-precision.bits * (1 + precision.group / 100 + (precision.scale_bits == 4) / 50)
        if precision.is_quantized
        else 0.0
        for precision in CANDIDATES
    }


def typical_sites(
    count: int, kv_heads: int = 8, dims: Callable[[int], tuple[int, int]] = lambda index: (128, 128)
) -> list[SiteImportance]:
    """The later the layer, the less its keys matter and the more its values do; keys matter more."""
    return [
        SiteImportance(
            layer=f"layers.{index}",
            shape=SiteShape(kv_heads, *dims(index)),
            key_gradient_norm=100.0 - index,
            value_gradient_norm=float(index),
            key_sensitivity=typical_sensitivity(8.0 * (count - index) / count),
            value_sensitivity=typical_sensitivity((index + 1) / count),
        )
        for index in range(count)
    ]


@st.composite
def small_sites(draw: st.DrawFn, candidates: Sequence[Precision] = CANDIDATES) -> list[SiteImportance]:
    # Sums of these are exact, so that equal totals are equal floats.
    losses = st.integers(0, 200).map(lambda count: count / 64)

    def sensitivity() -> Mapping[Precision, float]:
        precisions = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4, unique=True))
        return {precision: draw(losses) for precision in precisions}

    return [
        SiteImportance(
            layer=f"layers.{index}",
            shape=SiteShape(
                kv_heads=draw(st.sampled_from([1, 3])),
                key_dim=draw(st.sampled_from([32, 64, 96])),
                value_dim=draw(st.sampled_from([32, 64])),
            ),
            key_gradient_norm=draw(losses),
            value_gradient_norm=draw(losses),
            key_sensitivity=sensitivity(),
            value_sensitivity=sensitivity(),
        )
        for index in range(draw(st.integers(1, 3)))
    ]


def every_allocation(sites: list[SiteImportance]) -> list[Allocation]:
    choices = [list(itertools.product(site.key_sensitivity, site.value_sensitivity)) for site in sites]
    return [tuple(allocation) for allocation in itertools.product(*choices)]


def in_one_group_size(sites: list[SiteImportance]) -> list[SiteImportance]:
    """Without the candidates in groups of 16 where the same bits come in groups of 32."""

    def usual(sensitivity: Mapping[Precision, float]) -> Mapping[Precision, float]:
        large = {precision.bits for precision in sensitivity if precision.group == 32}
        return {each: loss for each, loss in sensitivity.items() if each.group == 32 or each.bits not in large}

    return [
        replace(site, key_sensitivity=usual(site.key_sensitivity), value_sensitivity=usual(site.value_sensitivity))
        for site in sites
    ]


@given(sites=small_sites(), bits=st.floats(1.0, 16.0))
def test_with_a_storage_budget_fisher_is_the_optimum_and_the_cheapest_one(
    sites: list[SiteImportance], bits: float
) -> None:
    def stored(allocation: Allocation) -> float:
        return as_plan(sites, allocation).storage_bits

    within = [allocation for allocation in every_allocation(sites) if stored(allocation) <= bits * (1 + 1e-9)]
    check_optimum(sites, within, stored, lambda: allocate(sites, storage_budget=bits))


@given(sites=small_sites([candidate for candidate in CANDIDATES if candidate.scale_bits == 4]), bits=st.floats(1, 16))
def test_with_a_budget_fisher_is_the_optimum_in_bits_and_then_in_groups(
    sites: list[SiteImportance], bits: float
) -> None:
    def codes(allocation: Allocation) -> float:
        return as_plan(sites, allocation).code_bits

    def stored(allocation: Allocation) -> float:
        return as_plan(sites, allocation).storage_bits

    within = [each for each in every_allocation(in_one_group_size(sites)) if codes(each) <= bits * (1 + 1e-9)]
    alike = check_optimum(sites, within, codes, lambda: allocate(in_one_group_size(sites), budget=bits))
    if alike is None:
        return
    allowed = max(codes(alike) + SCALE_ALLOWANCE, stored(alike)) + 1e-9
    regrouped = [each for each in every_allocation(sites) if widths(each) == widths(alike) and stored(each) <= allowed]
    check_optimum(sites, regrouped, stored, lambda: allocate(sites, budget=bits))


def widths(allocation: Allocation) -> list[tuple[int, int]]:
    return [(key.bits, value.bits) for key, value in allocation]


def check_optimum(
    sites: list[SiteImportance],
    within: list[Allocation],
    cost: Callable[[Allocation], float],
    allocating: Callable[[], Allocation],
) -> Allocation | None:
    """Of those within the budget, what is allocated has the least sensitivity and then the least cost; only where
    everything fits unquantized, and loses nothing, it is that.
    """
    if not within:
        with pytest.raises(BudgetError):
            allocating()
        return None
    chosen = allocating()
    untouched = ((Precision(16), Precision(16)),) * len(sites)
    if untouched in within and all(
        site.key_sensitivity[Precision(16)] == site.value_sensitivity[Precision(16)] == 0 for site in sites
    ):
        assert chosen == untouched
        return chosen
    least = min(total_sensitivity(sites, allocation) for allocation in within)
    assert chosen in within
    assert total_sensitivity(sites, chosen) == least
    assert cost(chosen) == min(cost(each) for each in within if total_sensitivity(sites, each) == least)
    return chosen


@given(sites=small_sites(), bits=st.floats(1.0, 16.0))
def test_costs_in_coarse_units_still_keep_the_budget(sites: list[SiteImportance], bits: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "CAPACITY_UNITS", 7)
        try:
            chosen = allocate(sites, policy="fisher", storage_budget=bits)
        except BudgetError:
            return
    assert as_plan(sites, chosen).storage_bits <= bits * (1 + 1e-9)


@given(
    items=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.floats(-5, 5)), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    capacity=st.integers(0, 50),
)
def test_the_knapsack_is_exact(items: list[list[tuple[int, float]]], capacity: int) -> None:
    if capacity < sum(min(cost for cost, _ in options) for options in items):
        with pytest.raises(ValueError, match="capacity"):
            knapsack.choose(items, capacity)
        return
    losses = [
        sum(loss for _, loss in choice)
        for choice in itertools.product(*items)
        if sum(cost for cost, _ in choice) <= capacity
    ]
    chosen = [options[index] for options, index in zip(items, knapsack.choose(items, capacity), strict=True)]
    assert sum(cost for cost, _ in chosen) <= capacity
    assert sum(loss for _, loss in chosen) == pytest.approx(min(losses), abs=1e-9)


def test_fisher_spends_where_it_matters() -> None:
    sites = typical_sites(30)
    plan = as_plan(sites, allocate(sites, policy="fisher", budget=2.3))
    assert plan.code_bits == pytest.approx(2.3)
    assert plan.key_bits > plan.value_bits
    assert plan.sites[0].key.bits > plan.sites[-1].key.bits
    richer = as_plan(sites, allocate(sites, policy="fisher", budget=3.0))
    assert total_sensitivity(sites, tuple((site.key, site.value) for site in richer.sites)) < total_sensitivity(
        sites, tuple((site.key, site.value) for site in plan.sites)
    )


def test_fisher_counts_scales_in_a_storage_budget() -> None:
    sites = typical_sites(30)
    plan = as_plan(sites, allocate(sites, policy="fisher", storage_budget=2.6))
    assert 2.59 < plan.storage_bits <= 2.6 + 1e-9
    assert {site.value.scale_bits for site in plan.sites} == {4}


def test_fisher_keeps_equal_losses_cheap() -> None:
    nothing_matters = dict.fromkeys(CANDIDATES, 0.0)
    site = SiteImportance("layer", SiteShape(2, 64, 64), 1.0, 1.0, nothing_matters, nothing_matters)
    ((key, value),) = allocate([site], policy="fisher", storage_budget=8.0)
    assert key == value == Precision(2, 32, 4)


@pytest.mark.parametrize("limit", [{"budget": 2.3}, {"storage_budget": 2.6}, {"storage_budget": 5.0}])
def test_fisher_takes_a_moment_for_80_layers(limit: dict[str, float]) -> None:
    sites = typical_sites(80)
    start = time.perf_counter()
    allocate(sites, policy="fisher", **limit)
    # A tenth of a second or less in practice; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("layers", [30, 32])
def test_kvmix_gives_a_fifth_of_the_layers_more(layers: int) -> None:
    sites = typical_sites(layers)
    plan = as_plan(sites, allocate(sites, policy="kvmix", budget=2.3))
    assert [site.key.bits for site in plan.sites] == [3] * 6 + [2] * (layers - 6)
    assert [site.value.bits for site in plan.sites] == [2] * (layers - 6) + [4] * 6
    assert {(site.key.group, site.key.scale_bits) for site in plan.sites} == {(32, 16)}
    assert {(site.value.group, site.value.scale_bits) for site in plan.sites} == {(32, 16)}


def test_kvmix_has_the_published_means() -> None:
    sites = typical_sites(32)
    plan = as_plan(sites, allocate(sites, policy="kvmix", budget=2.3))
    assert (plan.key_bits, plan.value_bits) == (2.1875, 2.375)
    assert plan.storage_bits == pytest.approx(plan.code_bits + 1)


@pytest.mark.parametrize("layers", [1, 7, 30, 32, 80])
def test_kvmix_meets_every_mean_it_can_have(layers: int) -> None:
    sites = typical_sites(layers)
    for count in range(layers + 1):
        allocation = allocate(sites, policy="kvmix", budget=2 + 1.5 * count / layers)
        assert sum(key.bits == 3 for key, _ in allocation) == count
        assert sum(value.bits == 4 for _, value in allocation) == count


def test_kvmix_counts_elements_where_heads_differ() -> None:
    sites = typical_sites(10, dims=lambda index: (192, 128) if index < 5 else (64, 64))
    plan = as_plan(sites, allocate(sites, policy="kvmix", budget=2.6))
    count = sum(site.key.bits == 3 for site in plan.sites)
    assert plan.code_bits <= 2.6
    assert as_plan(sites, allocate(sites, policy="kvmix", budget=2.9)).code_bits <= 2.9
    assert 0 < count < 10


@pytest.mark.parametrize(("head_dim", "group"), [(128, 32), (80, 20), (72, 24), (40, 20), (16, 16)])
@pytest.mark.parametrize("policy", ["kvmix", "uniform"])
def test_published_groups_divide_the_head(policy: Policy, head_dim: int, group: int) -> None:
    sites = typical_sites(4, dims=lambda index: (head_dim, head_dim))
    for key, value in allocate(sites, policy=policy, budget=3.0):
        assert (key.group, value.group) == (32, group)


@pytest.mark.parametrize("budget", [1.99, 3.51, 16.0])
def test_kvmix_names_its_range(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"2 to 3\.5 .*'fisher'"):
        allocate(typical_sites(8), policy="kvmix", budget=budget)


@pytest.mark.parametrize(
    ("budget", "bits"),
    [(1.0, (1, 1)), (2.0, (2, 2)), (2.3, (2, 2)), (2.5, (3, 2)), (3.9, (4, 3)), (7.0, (8, 4)), (16.0, (16, 16))],
)
def test_uniform_is_the_richest_pair_that_fits(budget: float, bits: tuple[int, int]) -> None:
    assert {(key.bits, value.bits) for key, value in allocate(typical_sites(5), policy="uniform", budget=budget)} == {
        bits
    }


def test_uniform_with_a_storage_budget_counts_scales() -> None:
    ((key, value), *_) = allocate(typical_sites(5), policy="uniform", storage_budget=3.0)
    assert (key, value) == (Precision(2, 32, 16), Precision(2, 32, 16))


@pytest.mark.parametrize("policy", ["fisher", "uniform"])
@pytest.mark.parametrize("unit", ["budget", "storage_budget"])
def test_a_generous_budget_keeps_everything(policy: Policy, unit: str) -> None:
    allocation = allocate(typical_sites(5), policy=policy, **{unit: 16.0})
    assert {precision.bits for pair in allocation for precision in pair} == {16}


@pytest.mark.parametrize("unit", ["budget", "storage_budget"])
def test_a_budget_for_everything_quantizes_nothing_though_no_loss_is_predicted(unit: str) -> None:
    nothing_read = dict.fromkeys(CANDIDATES, 0.0)
    site = SiteImportance("layer", SiteShape(2, 64, 64), 1.0, 1.0, nothing_read, nothing_read)
    ((key, value),) = allocate([site], policy="fisher", **{unit: 16.0})
    assert not key.is_quantized and not value.is_quantized


def test_a_budget_too_small_names_the_range() -> None:
    with pytest.raises(BudgetError, match="budget=1.5 .* code bits .* 2 to 16"):
        allocate(typical_sites(5), policy="fisher", budget=1.5)
    with pytest.raises(BudgetError, match="storage_budget=1.5 .* stored bits .* 2 to 16"):
        allocate(typical_sites(5), policy="uniform", storage_budget=1.5)


def test_the_lowest_budget_an_error_names_can_be_met() -> None:
    sites = typical_sites(5)
    with pytest.raises(BudgetError) as error:
        allocate(sites, policy="fisher", storage_budget=1.0)
    lowest = float(str(error.value).split(" average ")[1].split(" to ")[0])
    assert lowest > 2
    allocate(sites, policy="fisher", storage_budget=lowest)


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["fisher", "kvmix", "uniform"])
def test_a_budget_is_a_positive_number(policy: Policy, bits: float) -> None:
    with pytest.raises(AllocationError, match="positive"):
        allocate(typical_sites(2), policy=policy, budget=bits)


@pytest.mark.parametrize("policy", ["kvmix", "uniform"])
def test_heads_that_cannot_be_quantized_are_named(policy: Policy) -> None:
    sites = typical_sites(4, dims=lambda index: (64, 20 if index == 2 else 64))
    with pytest.raises(AllocationError, match="layers.2: a head of 20 channels cannot be quantized"):
        allocate(sites, policy=policy, budget=2.3)


def test_one_budget_is_given() -> None:
    with pytest.raises(AllocationError, match="either budget"):
        allocate(typical_sites(2), policy="fisher")
    with pytest.raises(AllocationError, match="either budget"):
        allocate(typical_sites(2), policy="fisher", budget=2.3, storage_budget=3.0)


def test_bad_input_is_named() -> None:
    with pytest.raises(AllocationError, match="fisher, kvmix, uniform"):
        allocate(typical_sites(2), policy="best", budget=2.3)  # type: ignore[arg-type]
    with pytest.raises(AllocationError, match="no attention site"):
        allocate([], policy="fisher", budget=2.3)
    nan, empty = {Precision(2): float("nan")}, dict[Precision, float]()
    fine = {Precision(2): 0.5}
    with pytest.raises(AllocationError, match="keys of broken"):
        allocate([SiteImportance("broken", SiteShape(1, 64, 64), 1.0, 1.0, nan, fine)], policy="fisher", budget=2.3)
    with pytest.raises(AllocationError, match="values of broken"):
        allocate([SiteImportance("broken", SiteShape(1, 64, 64), 1.0, 1.0, fine, empty)], policy="fisher", budget=2.3)
    with pytest.raises(AllocationError, match="value_gradient_norm of broken"):
        allocate(
            [SiteImportance("broken", SiteShape(1, 64, 64), 1.0, float("nan"), fine, fine)], policy="kvmix", budget=2.3
        )


# A context: what a site with a window holds of it


def with_windows(windows: Sequence[int]) -> list[SiteImportance]:
    return [
        replace(site, shape=replace(site.shape, window=window))
        for site, window in zip(typical_sites(len(windows)), windows, strict=True)
    ]


WINDOWED = with_windows([512, 512, 0, 512, 512, 0])


def importance_of(sites: Sequence[SiteImportance], context: int) -> Importance:
    return Importance(tuple(sites), "any", sinks=0, recent=128, tokens=0, loss=0.0, context=context)


@pytest.mark.parametrize("policy", ["fisher", "uniform", "kvmix"])
@pytest.mark.parametrize("unit", ["budget", "storage_budget"])
@pytest.mark.parametrize("context", [1024, 8192, 10**6])
def test_a_budget_is_the_mean_over_what_is_held_of_the_context(policy: Policy, unit: str, context: int) -> None:
    bits = 3.0 if policy != "kvmix" or unit == "storage_budget" else 2.4
    plan = importance_of(WINDOWED, context).allocate(policy=policy, **{unit: bits})
    held = [min(site.window or context, context) for site in plan.sites]
    assert plan.context == context
    if unit == "budget":
        total = sum(
            tokens * (site.key_elements * site.key.mean_bits + site.value_elements * site.value.bits)
            for tokens, site in zip(held, plan.sites, strict=True)
        )
        elements = sum(
            tokens * (site.key_elements + site.value_elements) for tokens, site in zip(held, plan.sites, strict=True)
        )
        assert plan.code_bits == pytest.approx(total / elements, rel=1e-2)
        assert plan.code_bits <= bits
    else:
        assert plan.storage_bits <= bits


@pytest.mark.parametrize("unit", ["budget", "storage_budget"])
def test_the_longer_the_context_the_more_bits_windows_get_and_the_less_is_lost(unit: str) -> None:
    plans = [importance_of(WINDOWED, context).allocate(**{unit: 2.7}) for context in (512, 4096, 32768)]
    windowed = [sum(site.key.mean_bits + site.value.bits for site in plan.sites if site.window) for plan in plans]
    assert windowed == sorted(windowed) and windowed[0] < windowed[-1]
    losses = [total_sensitivity(WINDOWED, [(site.key, site.value) for site in plan.sites]) for plan in plans]
    assert losses == sorted(losses, reverse=True)
    # None but the longest context: the same bits everywhere would be the plan of the shortest.
    assert plans[0].sites == replace(importance_of(WINDOWED, 0).allocate(**{unit: 2.7})).sites


@given(context=st.integers(1, 10**6))
def test_without_windows_a_context_says_nothing(context: int) -> None:
    sites = typical_sites(3)
    plan = importance_of(sites, context).allocate(budget=2.7)
    assert plan == importance_of(sites, 0).allocate(budget=2.7)
    assert plan.context == 0


def test_a_context_that_is_told_goes_before_the_models() -> None:
    importance = importance_of(WINDOWED, 8192)
    assert importance.allocate(budget=2.7, context=512).sites == importance_of(WINDOWED, 512).allocate(budget=2.7).sites
