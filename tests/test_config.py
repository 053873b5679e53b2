"""Which tokens stay unquantized."""

import pytest
import torch

import kvmix_compile
from kvmix_compile import Plan
from kvmix_compile.config import Config, unquantized_tokens
from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.models_zoo.plain import fused_arange
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.allocate.plan import SitePlan
from tests.helpers.one_capture import applied


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (("fixed", None, None), (64, 128)),
        (("fixed", 0, 32), (0, 32)),
        (("fixed", None, 64), (64, 64)),
        (("rpc", None, None), (0, 40)),
        (("rpc", 4, None), (4, 40)),
    ],
)
def test_a_recent_window_says_what_is_not_asked_for(arguments: tuple, tokens: tuple[int, int]) -> None:
    assert unquantized_tokens(*arguments) == tokens


@pytest.mark.parametrize("arguments", [("fixed", -1, None), ("rpc", None, 31), ("none", None, None)])
def test_impossible_states_are_refused(arguments: tuple) -> None:
    with pytest.raises(PlanError):
        unquantized_tokens(*arguments)


@pytest.mark.parametrize("context", [0, -1, 8192.0, True, "long"])
def test_a_context_is_a_number_of_tokens(context: object) -> None:
    with pytest.raises(PlanError, match="context is a number of tokens, 1 or more, not"):
        Config(budget=2.3, context=context).checked()  # type: ignore[arg-type]


def test_a_plan_has_its_own_context() -> None:
    site = SitePlan("layers.0", SiteShape(1, 32, 32), Precision(2, 32, 4), Precision(2, 32, 4))
    with pytest.raises(PlanError, match="either a plan or a context"):
        Config(plan=Plan((site,), "by hand", "", 0, 32), context=100).checked()


def test_a_models_windows_get_more_bits_for_longer_texts() -> None:
    model, calibration = tiny("gemma2", sliding_window=100), torch.randint(3, 128, (2, 128))
    options = {"budget": 2.3, "calibration": calibration, "sinks": 0, "recent": 32}
    short, usual = (applied(model, **options, context=context).kvmix_plan for context in (100, None))
    assert (short.context, usual.context) == (100, model.config.max_position_embeddings)
    assert usual.sites[0].key.mean_bits > short.sites[0].key.mean_bits
    assert usual.code_bits <= 2.3


def test_the_paper_is_two_words() -> None:
    calibration = torch.randint(3, 64, (1, 96), generator=torch.Generator().manual_seed(0))
    plan = kvmix_compile.apply(fused_arange(), policy="kvmix", recent_window="rpc", calibration=calibration).kvmix_plan
    assert (plan.policy, plan.sinks, plan.recent) == ("kvmix", 0, 40)
    assert {(site.key.group, site.value.scale_bits) for site in plan.sites} == {(32, 16)}
