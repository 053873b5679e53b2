"""The CPU's kernel of attend against the reference."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu import binding as cpu
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import TOLERANCE, Case, cases, weighted
from tests.kernels.covering import Combination, covering, named
from tests.kernels.every_pair import ATTENDING, case_of, fits
from tests.kernels.layouts import IMPORTANT_BITS

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler, or KVMIX_CPU_KERNELS=0")

CASES = weighted(cases(value_groups=(8, 16, 32, 64), values_are_keys=(False, False, True)))
# What a stretch of one query has: STRETCH_TILES in cpu.cpp.
STRETCH = 8 * 32


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(case: Case, weighting: Weighting | None = None) -> None:
    attended = cpu.attend(*case.poisoned().arguments(weighting))
    assert attended.dtype == case.q.dtype and attended.is_contiguous()
    tolerance = TOLERANCE[case.q.dtype]
    expected = reference.attend(*case.arguments(weighting))
    torch.testing.assert_close(attended, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chosen", covering(ATTENDING, fits), ids=named)
def test_every_two_choices_meet(chosen: Combination) -> None:
    check(*case_of(chosen))


@settings(max_examples=300)
@given(CASES)
def test_it_is_the_reference(case: tuple[Case, Weighting]) -> None:
    check(*case)


@settings(max_examples=150)
@given(CASES)
def test_a_state_that_grew_is_read_as_one_allocated_whole(case: tuple[Case, Weighting]) -> None:
    whole, weighting = case
    grown = whole.poisoned().as_grown()
    for kernel in (cpu.attend, reference.attend):
        assert torch.equal(kernel(*grown.arguments(weighting)), kernel(*whole.arguments(weighting)))


def test_it_is_the_reference_with_narrower_vectors(narrower_vectors: None) -> None:
    @settings(max_examples=150)
    @given(CASES)
    def compare(case: tuple[Case, Weighting]) -> None:
        check(*case)

    compare()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512)]
)
def test_heads_of_real_models(key_dim: int, value_dim: int, bits: int) -> None:
    group = 32 if value_dim % 32 == 0 else 16
    key, value = Precision(bits, 32, 4), Precision(bits, group, 16 if bits % 2 else 4)
    layout = StateLayout(SiteShape(2, key_dim, value_dim), key=key, value=value, sinks=4, recent=32)
    for shared, dtype in ((1, torch.float32), (4, torch.bfloat16), (11, torch.float32)):
        check(Case.random(layout, shared, [131], [0], 1, dtype))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_values_that_are_keys_too(bits: int) -> None:
    """A latent and a rotary key, in the sizes of a real model and in others that no vector divides."""
    for key_dim, value_dim in ((64, 512), (24, 40)):
        key, value = Precision(bits, 32, 4), Precision(bits, 8, 4)
        layout = StateLayout(SiteShape(1, key_dim, value_dim), key=key, value=value, sinks=4, recent=32)
        for query_heads, dtype in ((1, torch.float32), (4, torch.bfloat16), (70, torch.float32)):
            check(Case.random(layout, query_heads, [131, 3], [0, 1], 2, dtype, values_are_keys=True))


@pytest.mark.parametrize(("important_bits", "bits"), IMPORTANT_BITS)
@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("scale_bits", [4, 16])
def test_keys_with_important_channels(important_bits: tuple[int, ...], bits: int, group: int, scale_bits: int) -> None:
    key = Precision(bits, group, scale_bits, important_bits)
    for key_dim in filter(lambda dim: key.fits(dim, Axis.TOKENS), (16, 32, 64, 80, 96, 128)):
        layout = StateLayout(SiteShape(2, key_dim, 16), key=key, value=Precision(2, 16, 4), sinks=4, recent=32)
        for shared in (1, 3, 11):
            check(Case.random(layout, shared, [131], [0], 1, torch.float32))


def test_channels_of_any_number_at_full_precision() -> None:
    layout = StateLayout(SiteShape(1, 7, 13), key=Precision(16), value=Precision(16), sinks=3, recent=32)
    check(Case.random(layout, 2, [100, 5], [0, 1], 3, torch.float32))


@pytest.mark.parametrize("past", [31, 32, 33, STRETCH - 1, STRETCH, STRETCH + 1, 3 * STRETCH - 1, 3 * STRETCH])
def test_around_every_stretch(past: int) -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(3, 16, 4), sinks=0, recent=32)
    for length in (past, past + 32):
        case = Case.random(layout, 2, [length, 3], [0, 0], 1, torch.float32)
        check(case)
        for size in (33, STRETCH):
            check(case, Weighting(0.25, sliding_window=size))
            check(case, Weighting(0.25, attention_chunk=size))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_chunk_of_many_queries(softcap: float) -> None:
    layout = StateLayout(SiteShape(2, 16, 24), key=Precision(2), value=Precision(3, 8, 4), sinks=2, recent=32)
    case = Case.random(layout, 3, [700, 3], [0, 20], 70, torch.float32)
    check(case, Weighting(0.25, softcap))
    for size in (20, 400):
        check(case, Weighting(0.25, softcap, sliding_window=size))
        check(case, Weighting(0.25, softcap, attention_chunk=size))


def test_elements_beyond_half_precision_stay_finite() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2, 32, 4), value=Precision(2, 16, 4), sinks=0, recent=32)
    case = Case.random(layout, 1, [70], [0], 1, torch.float16)
    k, v = (torch.full((1, 1, 70, 16), 65504.0, dtype=torch.float16) for _ in range(2))
    k[..., ::2, :], v[..., ::2, :] = -60000.0, -60000.0
    nothing = torch.zeros(1, dtype=torch.int64)
    reference.append(Chunk(key=k, value=v, lengths=nothing, starts=nothing), case.state, layout.storage)
    check(replace(case, q=case.q * 1e-5))
    # All weight on one token, so that the value is that token's, and beyond what half precision has.
    steep = replace(case, q=torch.ones_like(case.q))
    assert cpu.attend(*steep.arguments()).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_result_depends_neither_on_threads_nor_on_other_rows(tokens: int) -> None:
    layout = StateLayout(SiteShape(3, 16, 16), key=Precision(2), value=Precision(2, 16, 4), sinks=4, recent=32)
    case = Case.random(layout, 3, [900, 40, 600], [0, 0, 0], tokens, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(cpu.attend(*case.arguments()))
    assert all(torch.equal(result, results[0]) for result in results)
    for row in range(3):
        alone = case.mapped(lambda tensor, row=row: tensor[row : row + 1].contiguous())
        assert torch.equal(cpu.attend(*alone.arguments()), results[0][row : row + 1])


def test_any_strides() -> None:
    layout = StateLayout(SiteShape(2, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=4, recent=32)
    case = Case.random(layout, 2, [130], [0], 3, torch.float32)
    strided = replace(case, q=case.q.mT.contiguous().mT, k=case.k.mT.contiguous().mT, v=case.v.mT.contiguous().mT)
    assert torch.equal(cpu.attend(*strided.arguments()), cpu.attend(*case.arguments()))


def test_nothing_to_attend_with() -> None:
    layout = StateLayout(SiteShape(1, 16, 24), key=Precision(2), value=Precision(3, 8), sinks=2, recent=32)
    case = Case.random(layout, 2, [50], [0], 1, torch.float32)
    no_rows = case.mapped(lambda tensor: tensor[:0])
    no_tokens = replace(case, q=case.q[:, :, :0], k=case.k[:, :, :0], v=case.v[:, :, :0])
    for empty in (no_rows, no_tokens):
        assert cpu.attend(*empty.arguments()).shape == (*empty.q.shape[:3], 24)


def test_nothing_is_read_beyond_the_state() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=0, recent=32)
    case = Case.random(layout, 1, [50], [0], 1, torch.float32)
    with pytest.raises(KVMixError, match="room"):
        cpu.attend(*replace(case, lengths=torch.tensor([100_000])).arguments())


def test_what_is_no_number_is_not_hidden() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=2, recent=32)
    case = Case.random(layout, 1, [50], [0], 1, torch.float32)
    for name in ("q", "k", "v"):
        wrong = getattr(case, name).clone()
        wrong[..., 3] = torch.nan
        for softcap in (0.0, 5.0):
            arguments = replace(case, **{name: wrong}).arguments(Weighting(0.25, softcap))
            assert cpu.attend(*arguments).isnan().any()
    case.state.sink_k[:, :, 0] = torch.nan
    assert cpu.attend(*case.arguments()).isnan().all()


def test_a_prompt_goes_to_pytorch() -> None:
    layout = StateLayout(SiteShape(2, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=2, recent=32)
    case = Case.random(layout, 2, [0, 0], [0, 3], 20, torch.float32)
    assert torch.equal(cpu.attend(*case.arguments()), reference.attend(*case.arguments()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from /proc")
def test_a_decode_step_never_holds_what_it_dequantizes() -> None:
    program = """
import re, torch
from pathlib import Path
import kvmix_compile.kernels.ops
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

precision = Precision(2, 32, 4)
layout = StateLayout(SiteShape(2, 128, 128), key=precision, value=precision, sinks=4, recent=32)
state = SiteState.allocate(layout, 1, layout.required_blocks(100_001), torch.float32)
state.packed_k.fill_(3), state.packed_v.fill_(3)
q, k = torch.ones(1, 6, 1, 128), torch.ones(1, 2, 1, 128)
ints = layout.key.as_ints(), layout.value.as_ints(), layout.recent
def step(length):
    inputs = (k, k, torch.tensor([length]), torch.tensor([0]), *state.tensors(), *ints)
    torch.ops.kvmix.attend.default(q, *inputs, 0.1, 0.0, 0)
    torch.ops.kvmix.append.default(*inputs)
step(1000)
before = peak()
step(100_000)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    dequantized = 2 * 2 * 100_000 * 128 * 4
    assert int(output) < dequantized / 50
