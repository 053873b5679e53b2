"""The kernels as they are compiled for sm_80 and sm_90, carried out on CPU tensors.

What is marked takes minutes: `make test-compiled`. `make ptx` tries every pair of choices.
"""

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kvmix_compile.kernels.format.precision import Precision  # noqa: E402
from kvmix_compile.kernels.format.shape import SiteShape  # noqa: E402
from kvmix_compile.kernels.format.state import StateLayout  # noqa: E402
from tests.kernels.attend_cases import Case  # noqa: E402
from tests.kernels.covering import Combination, named  # noqa: E402
from tests.kernels.gpu.compiled import CHIPS, NOT_NOTICED, carry_out, fate_of_mutants, sample  # noqa: E402
from tests.kernels.gpu.trials import beyond_half_precision, check_attend  # noqa: E402
from tests.ptx.driver import chip  # noqa: E402

SAMPLE = list(sample())


@pytest.mark.choices
@pytest.mark.parametrize(("kernel", "chosen"), SAMPLE, ids=[f"{kernel}, {named(chosen)}" for kernel, chosen in SAMPLE])
def test_each_choice_agrees_with_the_reference(kernel: str, chosen: Combination) -> None:
    carry_out(kernel, chosen, chosen["chip"])


@pytest.mark.parametrize("number", CHIPS)
def test_fields_that_a_thread_has_of_several_slices(number: int) -> None:
    """Where so few bytes make a row that a thread's next registers are not of the next channels."""
    key, value = Precision(1, 32, 4, (8, 4, 2)), Precision(1, 16, 4)
    layout = StateLayout(SiteShape(1, 64, 80), key=key, value=value, sinks=4, recent=32)
    with chip(number):
        check_attend(Case.random(layout, 3, [200, 131], [0, 0], 1, torch.float16), splits=2, blocks=2)


@pytest.mark.parametrize("bits", [2, 8])
def test_elements_beyond_half_precision_stay_finite(bits: int) -> None:
    with chip(80):
        check_attend(beyond_half_precision(bits), splits=2, blocks=1)


# Barriers and waits that others make superfluous: behind attend's loop over packed blocks, where no copy is under way
# any more, and before its new tokens are stored where nobody read; in append before a reduction between warps, twice,
# and before the ring is written, twice, with a reduction's barriers since it was read. attend_codes is one warp, within
# which nothing is noticed.
SUPERFLUOUS = {"attend_elements": 3, "append": 4}


@pytest.mark.parametrize(
    ("kernel", "number"),
    [
        ("attend_elements", 90),
        pytest.param("append", 80, marks=pytest.mark.choices),
    ],
)
def test_a_barrier_a_wait_or_a_fence_that_is_missing_is_noticed(kernel: str, number: int) -> None:
    fates = list(fate_of_mutants(kernel, number, ("barrier", "wait for copies", "fence")))
    left = [(what, line) for what, line, fate in fates if fate == NOT_NOTICED]
    assert len(fates) > 20 and len(left) <= SUPERFLUOUS[kernel], left
