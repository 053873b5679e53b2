"""The benchmark of engines' formats: which plans it compares."""

from kvmix_compile.engines.measured import MeasuredFormats
from kvmix_compile.kernels.format.floats import FP8, NVFP4
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.whole_layers import LayerLosses
from tests.helpers.benchmark_modules import benchmark

engines = benchmark("engines")


def measured(*losses: float) -> MeasuredFormats:
    layers = tuple(
        LayerLosses((f"layers.{number}.attn",), SiteShape(2, 32, 32), {FP8: loss, NVFP4: 10 * loss}, {FP8: 0, NVFP4: 0})
        for number, loss in enumerate(losses)
    )
    return MeasuredFormats(layers, tokens=1, scales="one", context=0)


def test_the_worst_choice_skips_as_many_layers_that_lose_least() -> None:
    found = measured(0.4, 0.1, 0.3, 0.2)
    plan = found.plan("nvfp4", budget=10)
    assert [layer.kept is None for layer in plan.layers] == [True, False, True, False]
    assert [layer.kept is None for layer in engines.worst(found, plan).layers] == [False, True, False, True]


def test_plans_that_are_alike_are_measured_once() -> None:
    plans = engines.each_once(engines.plans_of(measured(*[1e-6] * 6)))
    assert next(iter(plans)).startswith("fp8; fp8, most loss 0.01")
    assert len(set(plans.values())) == len(plans)
