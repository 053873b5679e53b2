"""Exponents: keys and values beyond what float16's scales hold are kept as well as any others."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from kvmix_compile import KVMixCache, Plan
from kvmix_compile.errors import KVMixError, PlanError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.measure.exponents import LEAST_LARGEST, MOST_LARGEST, exponents_of
from kvmix_compile.passes.rewrite.powers import powers_of_two
from tests.helpers.one_capture import analyzed, applied, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, quantized, unquantized

PROMPT = 200


@cache
def toy_llama(dtype: torch.dtype) -> PreTrainedModel:
    """Shared by all tests, each of which gives it weights."""
    return tiny("llama").to(dtype)


def scaled(side: str, factors: tuple[float, float], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The toy Llama, which has two KV heads of two query heads each, with other keys or values and equal logits.

    It is one model of each dtype, so that it is captured once: a test has one at a time.
    """
    model = toy_llama(dtype)
    model.load_state_dict(tiny("llama").state_dict())
    by_head = torch.tensor(factors, dtype=dtype).repeat_interleave(32)
    by_query_head = by_head.view(2, 1, 32).expand(2, 2, 32).reshape(-1)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if side == "keys":
                attention.k_proj.weight *= by_head[:, None]
                attention.q_proj.weight /= by_query_head[:, None]
            else:
                attention.v_proj.weight *= by_head[:, None]
                attention.o_proj.weight /= by_query_head[None]
    return model


def twin_of(model: PreTrainedModel, **options: object) -> PreTrainedModel:
    options = {"budget": 2.3} | options if "plan" not in options else options
    return applied(model, calibration=ids(2, 128), sinks=SINKS, recent=RECENT, verify=False, **options)


@cache
def usual(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return twin_of(zoo("llama") if dtype == torch.float32 else tiny("llama").to(dtype))


@cache
def text() -> Tensor:
    return ids(2, PROMPT + 50, seed=7)


def logits(model: PreTrainedModel) -> Tensor:
    """What is read of the cache: the logits behind the prompt."""
    past = KVMixCache(model)
    model(text()[:, :PROMPT], past_key_values=past)
    return model(text()[:, PROMPT:], past_key_values=past).logits.float()


FACTORS = [(2.0**17, 1.0), (2.0**-27, 2.0**-27), (2.0**60, 2.0**-60)]


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("factors", FACTORS)
def test_what_float16_cannot_hold_is_kept_as_well_as_what_it_can(side: str, factors: tuple[float, float]) -> None:
    other = twin_of(scaled(side, factors))
    assert [(site.key, site.value) for site in usual().kvmix_plan.sites] == [
        (site.key, site.value) for site in other.kvmix_plan.sites
    ]
    expected, exact = logits(usual()), zoo("llama")(text()).logits[:, PROMPT:].detach()
    # The exponents bring keys and values not quite to where they were, so that float16 rounds scales otherwise, which
    # tells most where codes have one bit.
    assert (logits(other) - expected).square().mean() < 0.2 * (expected - exact).square().mean()
    assert any("float16" in note and side in note for note in other.kvmix_report.notes)
    assert "float16's scales" in str(other.kvmix_report)


@pytest.mark.parametrize("policy", ["uniform", "kvmix", "fisher"])
@pytest.mark.parametrize("factor", [1e5, 1e-8])
def test_every_policy_keeps_them(policy: str, factor: float) -> None:
    options = {"policy": policy, "budget": 3}
    expected = logits(twin_of(zoo("llama"), **options))
    found = logits(twin_of(scaled("values", (factor, factor)), **options))
    exact = zoo("llama")(text()).logits[:, PROMPT:].detach()
    assert (found - exact).square().mean() < 1.2 * (expected - exact).square().mean()


@pytest.mark.parametrize("factor", [2.0**17, 2.0**-27])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_so_does_a_bfloat16_model(side: str, factor: float) -> None:
    other = twin_of(scaled(side, (factor, factor), torch.bfloat16))
    exact = zoo("llama")(text()).logits[:, PROMPT:].detach()
    assert (logits(other) - exact).square().mean() < 1.2 * (logits(usual(torch.bfloat16)) - exact).square().mean()


def test_ordinary_models_have_none() -> None:
    assert all(site.key_exponents == site.value_exponents == () for site in quantized().kvmix_plan.sites)
    assert quantized().kvmix_report.notes == ()
    assert "exponents" not in quantized().kvmix_plan.as_json()


def without_exponents(plan: Plan) -> Plan:
    return replace(plan, sites=tuple(replace(site, key_exponents=(), value_exponents=()) for site in plan.sites))


@pytest.mark.parametrize("factors", [(2.0**17, 1.0), (2.0**-27, 2.0**-27)])
def test_a_plan_made_without_them_gets_them(factors: tuple[float, float]) -> None:
    model = scaled("values", factors)
    measured = twin_of(model)
    given = without_exponents(measured.kvmix_plan)
    twin = twin_of(model, plan=given)
    assert (logits(twin) - logits(measured)).square().mean() < 0.01 * logits(measured).square().mean()
    assert twin.kvmix_plan != given


@pytest.mark.parametrize("factor", [1.0, 2.0**17])
def test_a_plan_that_was_saved_stays_as_it_is(factor: float, tmp_path: Path) -> None:
    model = scaled("keys", (factor, factor))
    plan = twin_of(model).kvmix_plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert twin_of(model, plan=tmp_path / "plan.json").kvmix_plan == plan


def test_what_is_not_quantized_is_not_divided() -> None:
    model = scaled("values", (1e5, 1e5))
    plan = unquantized(twin_of(model).kvmix_plan)
    assert twin_of(model, plan=plan).kvmix_plan == plan
    keys_only = replace(plan, sites=tuple(replace(site, key=Precision(2, 32, 4)) for site in plan.sites))
    assert twin_of(model, plan=keys_only).kvmix_plan == keys_only


def test_a_cache_is_saved_and_a_model_moved_and_copied_with_them(tmp_path: Path) -> None:
    import copy

    model = twin_of(scaled("values", (1e5, 1e-5)))
    past = KVMixCache(model)
    model(text()[:, :PROMPT], past_key_values=past)
    past.save(tmp_path / "cache")
    copied = copy.deepcopy(model)
    again = KVMixCache.load(tmp_path / "cache", copied)
    rest = text()[:, PROMPT:]
    assert torch.equal(copied(rest, past_key_values=again).logits, model(rest, past_key_values=past).logits)


def test_the_backend_divides_and_multiplies_too() -> None:
    from tests.helpers.cache_argument import with_cache

    model = scaled("values", (1e5, 1e-8))
    plan = twin_of(model).kvmix_plan
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kvmix", options={"plan": plan, "backend": "eager"})
    past = StaticCache(model.config, max_cache_len=300)
    with torch.no_grad():
        compiled(input_ids=text()[:, :PROMPT], **with_cache(past))
        steps = text()[:, PROMPT : PROMPT + 5].split(1, dim=1)
        found = torch.cat([compiled(input_ids=step, **with_cache(past)).logits for step in steps], dim=1)
    torch.testing.assert_close(found, logits(twin_of(model, plan=plan))[:, :5], atol=1e-3, rtol=1e-3)


# Ranges


@pytest.mark.parametrize("largest", [LEAST_LARGEST, 1.0, MOST_LARGEST, 0.0])
def test_what_fits_is_left_as_it_is(largest: float) -> None:
    assert exponents_of(torch.tensor([largest, 1.0])) == ()


@pytest.mark.parametrize("largest", [65504.0, 1e5, 3e38, 1e-8, 1e-38, 1e-45, 0.9 * LEAST_LARGEST, 1.1 * MOST_LARGEST])
def test_what_does_not_is_brought_to_where_float16_has_room(largest: float) -> None:
    numbers = torch.tensor([largest, 1.0, 0.0])
    exponents = exponents_of(numbers)
    assert exponents[1:] == (0, 0)
    powers = powers_of_two(exponents, 1, numbers).flatten()
    assert torch.equal(numbers / powers * powers, numbers), "not exact"
    assert powers_of_two(exponents, -1, numbers).flatten()[0] * powers[0] == 1
    # At the ends of float32 no power of two reaches further that has an inverse.
    least, most = (16, 32) if 1e-30 < largest < 1e30 else (1e-10, 256)
    assert least <= (numbers / powers)[0] < most


def test_float16_models_have_none_as_their_queries_could_not_be_multiplied() -> None:
    assert exponents_of(torch.tensor([6e4, 1e-7], dtype=torch.float16)) == ()


@pytest.mark.parametrize("exponents", [(1,), (1, 2, 3), (121, 0), (0, -121)])
def test_a_plan_has_one_for_each_head(exponents: tuple[int, ...]) -> None:
    (site, *_) = quantized().kvmix_plan.sites
    with pytest.raises(PlanError, match="key_exponents"):
        replace(site, key_exponents=exponents)
    with pytest.raises(PlanError, match="value_exponents"):
        replace(site, value_exponents=exponents)


# What is no number


def overflowing(part: str) -> Callable[[PreTrainedModel], Tensor]:
    return lambda model: model.get_submodule(f"model.layers.1.self_attn.{part}").weight


@pytest.mark.parametrize(("part", "what"), [("k_proj", "keys"), ("v_proj", "values")])
def test_keys_and_values_that_are_not_finite_are_named(part: str, what: str) -> None:
    model = tiny("llama")
    with torch.no_grad():
        overflowing(part)(model)[7, 3] = torch.inf
    for call in (
        lambda: analyzed(model, calibration=ids(2, 128)),
        lambda: applied(model, plan=quantized().kvmix_plan),
        lambda: applied(model, calibration=ids(2, 128), verify=False),
    ):
        with pytest.raises(KVMixError, match=f"^model.layers.1.self_attn: its {what} are not finite"):
            call()


@pytest.mark.parametrize("factor", [1e5, 1e12, 1e-12])
def test_what_is_measured_on_large_and_small_values_is_finite(factor: float) -> None:
    importance = analyzed(scaled("values", (factor, factor)), calibration=ids(2, 128))
    for site in importance.sites:
        numbers = [*site.key_sensitivity.values(), *site.value_sensitivity.values()]
        assert torch.tensor([*numbers, site.key_gradient_norm, site.value_gradient_norm]).isfinite().all()
