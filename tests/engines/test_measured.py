"""From a model to a plan for an engine."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from kvmix_compile import engines
from kvmix_compile.engines import measured as module
from kvmix_compile.engines.measured import MOST_LOSS, MeasuredFormats
from kvmix_compile.errors import AllocationError, BudgetError
from kvmix_compile.evaluate.comparison import compare
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.engine_caches import EngineCached
from tests.helpers.one_capture import captured_once, zoo
from tests.helpers.toy_llama import ids


@cache
def measured(name: str) -> MeasuredFormats:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "capture_to_measure", lambda model, _: captured_once(model))
        return engines.analyze(zoo(name), calibration=ids(2, 128))


def test_a_budget_says_how_many_layers_stay_at_16_bits() -> None:
    found = measured("llama")
    assert found.tokens == 256
    plan = found.plan("fp8", budget=12.5)
    (skipped,) = plan.skipped
    worst = max(found.layers, key=lambda layer: sum(layer.key_losses.values()) + sum(layer.value_losses.values()))
    assert skipped.names == worst.layers
    assert plan.code_bits == 12
    assert found.plan("nvfp4", storage_budget=4.5).stored_bits == 4.5


def test_without_a_budget_what_may_be_lost_says_it() -> None:
    found = measured("llama")
    all_of_them = found.uniform("nvfp4")
    assert found.plan("nvfp4", most_loss=found.loss(all_of_them)) == all_of_them
    assert not found.plan("nvfp4", most_loss=0).formats
    assert found.loss(found.plan("nvfp4")) <= MOST_LOSS


def test_several_formats_are_chosen_among_by_a_budget() -> None:
    plan = measured("llama").plan("fp8", "nvfp4", budget=6)
    assert sorted(each.name for each in plan.formats) == ["fp8", "nvfp4"]
    assert plan.code_bits == 6


def test_windows_count_for_what_they_hold() -> None:
    found = measured("gemma2")
    # One of two layers, which of a long text holds next to nothing.
    plan = found.plan("fp8", budget=8.5)
    assert [layer.kept is None for layer in plan.layers] == [True, False]
    assert plan.code_bits < 8.5


@pytest.mark.parametrize(
    ("asked", "formats", "reason"),
    [
        ({}, ["fp9"], "there is no KV cache format fp9; did you mean fp8?"),
        ({}, ["int3"], "there is no KV cache format int3; choose from fp8, nvfp4"),
        ({"budget": 7}, ["fp8"], "budget=7 cannot be met: .* average 8 an element; give that or more"),
        ({"budget": 17}, ["fp8"], "16 .* at most, not 17"),
        ({"budget": 9, "storage_budget": 9}, ["fp8"], "give either budget"),
        ({"budget": 9, "most_loss": 0.1}, ["fp8"], "give either a budget or most_loss"),
        ({"most_loss": -1}, ["fp8"], "most_loss is a number of nats a token, 0 or more, not -1"),
        ({}, ["fp8", "nvfp4"], "several formats are chosen among by a budget"),
    ],
)
def test_what_cannot_be_planned_is_refused(asked: dict[str, float], formats: list[str], reason: str) -> None:
    with pytest.raises((AllocationError, BudgetError), match=reason):
        measured("llama").plan(*formats, **asked)


def test_scales_that_there_are_not_are_refused_at_once() -> None:
    with pytest.raises(AllocationError, match="scales are one or calibrated, not 'max'"):
        engines.analyze(zoo("llama"), scales="max")  # type: ignore[arg-type]


def test_a_cache_kept_by_a_plan_loses_what_its_formats_lose_however_the_text_is_cut() -> None:
    model, found, text = zoo("llama"), measured("llama"), ids(1, 160)[0]
    plans = {"fp8": found.uniform("fp8"), "nvfp4": found.uniform("nvfp4")}
    nothing = replace(plans["fp8"], layers=tuple(replace(layer, kept=None) for layer in plans["fp8"].layers))
    caches = [EngineCached(name, model, plan) for name, plan in (plans | {"16 bits": nothing}).items()]
    whole, pieces = (
        compare([Configuration("original", model), *caches], text, chunk=chunk, window=160) for chunk in (80, 16)
    )
    divergences = {result.configuration: result.divergence.mean for result in whole}
    assert divergences["16 bits"] < 1e-9 < divergences["fp8"] < divergences["nvfp4"]
    for one, other in zip(whole, pieces, strict=True):
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-4)
        assert (one.code_bits, one.stored_bits, one.held_bits) == (other.code_bits, other.stored_bits, other.held_bits)
    assert torch.tensor([each.stored_bits for each in whole]).tolist() == [16, 8, 4.5, 16]
