"""Queries, keys and values of one dtype, and a state of another: nothing overflows, and nothing is rounded twice."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvmix_compile.kernels.ops  # noqa: F401  (registers the operators)
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import ENDLESS, SiteState, StateLayout
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.saturated import saturated
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import Case

LAYOUT = StateLayout(SiteShape(2, 16, 24), key=Precision(3, 32, 4), value=Precision(2, 8, 16), sinks=3, recent=32)
KEYS_ALONE = replace(LAYOUT, value=Precision(16))
# Too small for float16, within it, and beyond its largest number.
SIZES = st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 300.0, 7e4, 1e6, 1e30])


def rows(heads: int, tokens: int, dim: int) -> Tensor:
    return torch.randn(2, tokens, heads, dim).transpose(1, 2)


@st.composite
def outliers(draw: st.DrawFn, heads: int, tokens: int, dim: int) -> Tensor:
    """Rows with a few elements of another size."""
    torch.manual_seed(draw(st.integers(0, 99)))
    drawn = rows(heads, tokens, dim)
    for size in draw(st.lists(SIZES, max_size=4)):
        drawn[0, 0, draw(st.integers(0, tokens - 1)), draw(st.integers(0, dim - 1))] = size
        drawn[1, 0, :, draw(st.integers(0, dim - 1))] = -size
    return drawn


@st.composite
def texts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Queries of any size, keys, values, and where the text is cut."""
    tokens = draw(st.sampled_from([2, 5, 40, 90]))
    q = rows(4, tokens, LAYOUT.key_dim) * draw(st.sampled_from([1.0, 1e5]))
    k, v = draw(outliers(2, tokens, LAYOUT.key_dim)), draw(outliers(2, tokens, LAYOUT.value_dim))
    return q, k, v, sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=3)))


def state_of(layout: StateLayout) -> SiteState:
    return SiteState.allocate(layout, 2, 3, layout.unquantized_dtype(torch.float32))


def read(text: tuple[Tensor, Tensor, Tensor, list[int]], state: SiteState, layout: StateLayout) -> list[Tensor]:
    """What is attended in each piece; the state holds the text then."""
    q, k, v, cuts = text
    attended, lengths, starts = [], torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for first, end in zip([0, *cuts], [*cuts, q.shape[2]], strict=True):
        piece = Chunk(key=k[:, :, first:end], value=v[:, :, first:end], lengths=lengths, starts=starts)
        arguments, named = attend_arguments(q[:, :, first:end], piece, state, layout.storage, Weighting(0.25))
        attended.append(torch.ops.kvmix.attend.default(*arguments, **named))
        torch.ops.kvmix.append.default(*append_arguments(piece, state, layout.storage))
        lengths = lengths + (end - first)
    return attended


def widened(state: SiteState) -> SiteState:
    """The same numbers in float32."""
    return SiteState(*(each.clone() if each.dtype == torch.uint8 else each.float() for each in state.tensors()))


def test_a_float32_model_has_float16_states_where_both_are_quantized() -> None:
    assert LAYOUT.unquantized_dtype(torch.float32) == torch.float16
    never_packed = replace(LAYOUT, shape=SiteShape(2, 16, 24, window=20), sinks=0, recent=ENDLESS)
    values_alone, neither = (replace(layout, key=Precision(16)) for layout in (LAYOUT, KEYS_ALONE))
    for layout in (KEYS_ALONE, values_alone, neither, never_packed):
        assert layout.unquantized_dtype(torch.float32) == torch.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert LAYOUT.unquantized_dtype(dtype) == dtype


@settings(max_examples=60, deadline=None)
@given(texts())
def test_a_state_holds_finite_numbers_and_the_same_however_a_text_is_cut(
    text: tuple[Tensor, Tensor, Tensor, list[int]],
) -> None:
    q, k, v, _ = text
    cut, whole = state_of(LAYOUT), state_of(LAYOUT)
    attended = read(text, cut, LAYOUT)
    read((q, k, v, []), whole, LAYOUT)
    assert all(piece.dtype == torch.float32 and piece.isfinite().all() for piece in attended)
    for one, other in zip(cut.tensors(), whole.tensors(), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    assert torch.equal(cut.sink_k[:, :, :2], saturated(k[:, :, :2], torch.float16))


@settings(max_examples=60, deadline=None)
@given(texts(), st.sampled_from([torch.ops.kvmix.attend, torch.ops.kvmix.attend_stepwise]))
def test_a_float16_state_is_read_as_the_same_numbers_in_float32_are(
    text: tuple[Tensor, Tensor, Tensor, list[int]], operator: torch._ops.OpOverloadPacket
) -> None:
    state = state_of(LAYOUT)
    read(text, state, LAYOUT)
    q, lengths = text[0][:, :, :2], torch.full((2,), text[0].shape[2])
    # Numbers that float16 has: attend_stepwise takes new tokens as they will be stored.
    chunk = Chunk(key=torch.ones(2, 2, 2, 16), value=torch.ones(2, 2, 2, 24), lengths=lengths, starts=lengths * 0)
    found, expected = (
        operator.default(*attend_arguments(q, chunk, held, LAYOUT.storage, Weighting(0.25))[0])
        for held in (state, widened(state))
    )
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_queries_are_not_rounded_to_the_dtype_of_the_state() -> None:
    """Two keys whose scores differ by less than float16 would tell apart."""
    layout = replace(LAYOUT, sinks=40)
    state = state_of(layout)
    k = torch.zeros(2, 2, 2, 16)
    k[..., 0, 0], k[..., 1, 1] = 1, 1
    v = torch.zeros(2, 2, 2, 24)
    v[..., 0, :] = 1
    nothing = torch.zeros(2, dtype=torch.int64)
    torch.ops.kvmix.append.default(*append_arguments(Chunk(k, v, nothing, nothing), state, layout.storage))
    q = torch.zeros(2, 4, 1, 16)
    q[..., 0], q[..., 1] = 4097, 4096  # one number in float16
    new = Chunk(-k[:, :, :1] - k[:, :, 1:], v[:, :, 1:], nothing + 2, nothing)
    arguments, named = attend_arguments(q, new, state, layout.storage, Weighting(1.0))
    attended = torch.ops.kvmix.attend.default(*arguments, **named)
    expected = torch.full_like(attended, 1 / (1 + math.exp(-1)))
    torch.testing.assert_close(attended, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given_in", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [LAYOUT, KEYS_ALONE])
def test_any_two_dtypes_go_together(layout: StateLayout, given_in: torch.dtype, kept: torch.dtype) -> None:
    case = Case.random(layout, 2, [100, 7], [0, 1], 3, torch.float32, kept=kept)
    found, expected = (
        torch.ops.kvmix.attend.default(*attend_arguments(q, chunk, state, layout.storage, Weighting(0.25))[0])
        for q, chunk, state in (
            (case.q.to(given_in), case.chunk.in_dtype(given_in), case.state),
            (case.q, case.chunk, case.state),
        )
    )
    assert found.dtype == given_in
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
