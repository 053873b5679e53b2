"""The Triton kernel of append writes the reference's bytes: on a GPU, else in Triton's interpreter."""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import BIT_WIDTHS, Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.stepwise import stepwise
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.append_pair import Pair
from tests.kernels.covering import Combination, covering, named
from tests.kernels.engine import PagedPair
from tests.kernels.every_pair import APPENDING, PAGES, fits
from tests.kernels.gpu.trials import PLACES, check_chosen_append, in_long_runs, random_chunk
from tests.kernels.layouts import IMPORTANT_BITS, drawn_layouts, with_important_keys
from tests.kernels.page_checks import check_left_out, check_shared_pages

triton_append = pytest.importorskip("kvmix_compile.kernels.gpu.append")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    # The whole module, whose covering array takes a second to be drawn.
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

precisions = st.builds(Precision, st.sampled_from(BIT_WIDTHS), st.sampled_from([8, 16, 32]), st.sampled_from([4, 16]))
layouts = drawn_layouts(
    precisions,
    precisions.map(lambda precision: replace(precision, group=8)),
    key_dims=[16, 40, 64],
    value_dims=[16, 24, 64],
    sinks=[0, 3, 40],
    recent=[32, 45, 64],
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def pair_of(layout: StateLayout, batch: int, dtype: torch.dtype, grows: bool = False) -> Pair:
    return Pair(triton_append.append, layout, batch, dtype, DEVICE, grows=grows, least_slots=1)


@pytest.mark.parametrize("chosen", covering(APPENDING | PLACES, fits, together=1), ids=named)
def test_each_choice(chosen: Combination) -> None:
    check_chosen_append(chosen, DEVICE)


@in_long_runs(DEVICE)
@pytest.mark.parametrize("chosen", covering(APPENDING | PLACES, fits), ids=named)
def test_every_two_choices_meet(chosen: Combination) -> None:
    check_chosen_append(chosen, DEVICE)


@settings(max_examples=25)
@given(
    with_important_keys(layouts), dtypes, st.sampled_from([1.0, 1.0, 1e-6, 200.0, 30000.0]), st.booleans(), st.data()
)
def test_it_writes_the_bytes_of_the_reference(
    layout: StateLayout, dtype: torch.dtype, size: float, grows: bool, data: st.DataObject
) -> None:
    pair = pair_of(layout, 2, dtype, grows)
    for tokens in data.draw(st.lists(st.sampled_from([1, 1, 2, 31, 33, 70, 110]), min_size=1, max_size=3)):
        starts = torch.tensor([data.draw(st.sampled_from([0, 0, 1, tokens // 2, tokens])) for _ in range(2)])
        k, v = random_chunk(layout, 2, tokens, dtype, size)
        for row, start in enumerate(starts.tolist()):
            k[row, :, :start] = v[row, :, :start] = torch.nan
        pair.append(k, v, starts)
    pair.check()


SHORTLY_BEFORE = [1, 1, 33, 1, 1, 1, 1, 28, *[1] * 8]


@pytest.mark.parametrize(("important_bits", "bits"), [*(((), bits) for bits in BIT_WIDTHS), *IMPORTANT_BITS])
def test_token_by_token(important_bits: tuple[int, ...], bits: int) -> None:
    key, value = Precision(bits, 32, 4, important_bits), Precision(bits, 24, 16)
    layout = StateLayout(SiteShape(1, 32, 24), key=key, value=value, sinks=5, recent=32)
    pair = pair_of(layout, 1, torch.float32)
    k, v = random_chunk(layout, 1, 75, torch.float32, 1.0)
    # The first block is full with the 38th token, and the second one with the 70th.
    for some_k, some_v in zip(k.split(SHORTLY_BEFORE, dim=2), v.split(SHORTLY_BEFORE, dim=2), strict=True):
        pair.append(some_k, some_v, torch.tensor([0]))
    pair.check()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_heads_of_real_models(dim: int) -> None:
    for important_bits, bits in (((), 2), ((), 3), ((4, 4), 2), ((4, 4), 3), ((4,), 2)):
        key, value = Precision(bits, 32, 4, important_bits), Precision(bits, dim // 2, 4)
        if not key.fits(dim, Axis.TOKENS):
            continue
        layout = StateLayout(SiteShape(1, dim, dim), key=key, value=value, sinks=4, recent=32)
        pair = pair_of(layout, 1, torch.bfloat16)
        pair.append(*random_chunk(layout, 1, 140, torch.bfloat16, 1.0), torch.tensor([0]))
        pair.check()


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.5, 1e-30, 65504.0, 1e30])
def test_equal_elements(constant: float) -> None:
    for important_bits, scale_bits in product(((), (3, 3), (4,)), (4, 16)):
        key, value = Precision(2, 32, scale_bits, important_bits), Precision(3, 16, scale_bits)
        layout = StateLayout(SiteShape(1, 32, 32), key=key, value=value, sinks=0, recent=32)
        pair = pair_of(layout, 1, torch.float32)
        chunk = torch.full((1, 1, 100, 32), constant)
        pair.append(chunk, chunk, torch.tensor([0]))
        pair.check()


@settings(max_examples=10)
@given(with_important_keys(layouts), dtypes, st.sampled_from(PAGES), st.data())
def test_it_writes_the_bytes_of_the_reference_into_pages(
    layout: StateLayout, dtype: torch.dtype, page: tuple[int, int], data: st.DataObject
) -> None:
    pair = PagedPair(triton_append.append, layout, 2, dtype, page, DEVICE)
    for tokens in data.draw(st.lists(st.sampled_from([1, 1, 2, 33, 70]), min_size=1, max_size=3)):
        starts = torch.tensor([data.draw(st.sampled_from([0, 0, tokens // 2, tokens])) for _ in range(2)])
        pair.append(*random_chunk(layout, 2, tokens, dtype, 1.0), starts)
        pair.check()


def test_rows_share_pages_and_complete_the_same_block_of_them() -> None:
    check_shared_pages(triton_append.append, 1, DEVICE)


def test_what_has_no_page_is_left_out() -> None:
    check_left_out(triton_append.append, DEVICE)


def test_a_block_without_room_is_not_written() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(3, 16, 4), sinks=0, recent=32)
    k, v = random_chunk(layout, 2, 200, torch.float32, 1.0)
    # The state is the middle of larger tensors, so that a write past its end would show.
    whole = SiteState.allocate(layout, 3, 2, torch.float32, DEVICE)
    state = SiteState(*(tensor[1:2] for tensor in whole.tensors()))
    nothing = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    chunk = Chunk(key=k[:1].to(DEVICE), value=v[:1].to(DEVICE), lengths=nothing, starts=nothing)
    triton_append.append(chunk, state, layout.storage)
    assert all(not tensor[0].any() and not tensor[2].any() for tensor in whole.tensors())
    assert state.packed_k.any(-1).all()


@pytest.mark.parametrize("window", [0, 40])
def test_with_attend_it_makes_stepwise_of_any_cut(window: int) -> None:
    """Two rows, one with padding: as the reference does token by token, for the state to the byte."""
    triton_attend = pytest.importorskip("kvmix_compile.kernels.gpu.attend")
    shape, precision = SiteShape(1, 16, 16, window), Precision(2, 16, 4)
    layout = StateLayout(shape, key=precision, value=precision, sinks=3, recent=32)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 90, 16), torch.randn(2, 1, 90, 16), torch.randn(2, 1, 90, 16)
    kernels = stepwise(triton_attend.attend, triton_append.append), stepwise(reference.attend, reference.append)
    results = []
    for kernel, cuts, device in ((kernels[0], [57, 33], DEVICE), (kernels[1], [1] * 90, "cpu")):
        state = SiteState.allocate(layout, 2, layout.capacity_blocks(90), torch.float32, device)
        lengths, padding = torch.zeros(2, dtype=torch.int64, device=device), torch.tensor([0, 11], device=device)
        outputs, begin = [], 0
        for tokens in cuts:
            part = slice(begin, begin + tokens)
            starts = (padding - begin).clamp(0, tokens)
            queries, keys, values = (tensor[:, :, part].to(device) for tensor in (q, k, v))
            chunk = Chunk(key=keys, value=values, lengths=lengths, starts=starts)
            weighting = Weighting(0.25, sliding_window=window)
            outputs.append(kernel(queries, chunk, state, layout.storage, weighting).cpu())
            lengths, begin = lengths + tokens - starts, begin + tokens
        results.append((torch.cat(outputs, dim=2), [tensor.cpu() for tensor in state.tensors()]))
    (found, state), (expected, its_state) = results
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(state, its_state, strict=True):
        assert torch.equal(ours, theirs)
