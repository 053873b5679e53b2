"""Which tokens stay unquantized."""

import pytest
import torch

import kvmix_compile
from kvmix_compile.config import unquantized_tokens
from kvmix_compile.errors import PlanError
from kvmix_compile.models_zoo.plain import fused_arange


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


def test_the_paper_is_two_words() -> None:
    calibration = torch.randint(3, 64, (1, 96), generator=torch.Generator().manual_seed(0))
    plan = kvmix_compile.apply(fused_arange(), policy="kvmix", recent_window="rpc", calibration=calibration).kvmix_plan
    assert (plan.policy, plan.sinks, plan.recent) == ("kvmix", 0, 40)
    assert {(site.key.group, site.value.scale_bits) for site in plan.sites} == {(32, 16)}
