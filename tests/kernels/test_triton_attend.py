"""The Triton kernel of attend against the reference: on a GPU, else in Triton's interpreter."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.precision import Precision
from kvmix_compile.kernels.state import SiteState, StateLayout

triton_attend = pytest.importorskip("kvmix_compile.kernels.triton_attend")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="neither a GPU nor Triton's interpreter"
)

BITS = st.sampled_from([1, 2, 3, 4, 8, 16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Rows with a past, and a chunk that follows it."""

    layout: StateLayout
    state: SiteState
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    starts: Tensor

    @classmethod
    def random(
        cls, layout: StateLayout, shared: int, lengths: list[int], starts: list[int], tokens: int, dtype: torch.dtype
    ) -> "Case":
        def draw(heads: int, count: int, dim: int) -> Tensor:
            return torch.randn(len(lengths), count, heads, dim).to(dtype).transpose(1, 2)

        longest, heads = max(lengths), layout.kv_heads
        state = SiteState.allocate(layout, len(lengths), layout.required_blocks(longest) + 2, dtype)
        k, v = draw(heads, longest, layout.key_dim), draw(heads, longest, layout.value_dim)
        padding = torch.tensor([longest - length for length in lengths])
        reference.append(
            k, v, torch.zeros_like(padding), padding, *state.tensors(), layout.key, layout.value, layout.recent
        )
        chunk = draw(heads * shared, tokens, layout.key_dim), draw(heads, tokens, layout.key_dim)
        return cls(
            layout, state, *chunk, draw(heads, tokens, layout.value_dim), torch.tensor(lengths), torch.tensor(starts)
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.lengths, self.starts, *self.state.tensors()

    def poisoned(self) -> "Case":
        """The same with NaN and all ones wherever no token lies."""
        layout = self.layout
        state = SiteState(*(tensor.clone() for tensor in self.state.tensors()))
        q, k, v = self.q.clone(), self.k.clone(), self.v.clone()
        for row, (length, start) in enumerate(zip(self.lengths.tolist(), self.starts.tolist(), strict=True)):
            blocks = layout.required_blocks(length)
            waiting = [(u - layout.sinks) % layout.tail_slots for u in range(layout.sinks + 32 * blocks, length)]
            unused = [slot for slot in range(layout.tail_slots) if slot not in waiting]
            for sink, packed, tail, chunk in (
                (state.sink_k, state.packed_k, state.tail_k, k),
                (state.sink_v, state.packed_v, state.tail_v, v),
            ):
                sink[row, :, length:] = torch.nan
                packed[row, :, blocks:] = 0xFF
                tail[row, :, unused] = torch.nan
                chunk[row, :, :start] = torch.nan
            q[row, :, :start] = torch.nan
        return replace(self, state=state, q=q, k=k, v=v)


def check(case: Case, softcap: float, sliding_window: int, splits: int, blocks: int, query_tile: int = 16) -> None:
    layout = case.layout
    scale = layout.key_dim**-0.5
    options = (layout.key, layout.value, layout.recent, scale, softcap, sliding_window)
    expected = reference.attend(*case.tensors(), *options)
    queries = case.q.shape[1] // layout.kv_heads * case.q.shape[2]
    launch = triton_attend.Launch(query_tile, -(-queries // query_tile), splits, blocks)
    attended = triton_attend.attend(*(t.to(DEVICE) for t in case.poisoned().tensors()), *options, launch=launch)
    assert attended.dtype == case.q.dtype and attended.is_contiguous()
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(attended.cpu(), expected, rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    precision = st.builds(Precision, BITS, st.sampled_from([8, 16, 32]), st.sampled_from([4, 16]))
    layout = StateLayout(
        kv_heads=draw(st.sampled_from([1, 2])),
        key_dim=draw(st.sampled_from([16, 40, 64])),
        value_dim=draw(st.sampled_from([16, 24, 64])),
        key=draw(precision),
        value=replace(draw(precision), group=8),
        sinks=draw(st.sampled_from([0, 3, 40])),
        recent=draw(st.sampled_from([32, 45])),
        rollback=draw(st.sampled_from([0, 7])),
    )
    full = layout.sinks + layout.recent
    edge = st.sampled_from([0, 1, layout.sinks, full, full + 32, full + 64, full + 128])
    past = st.builds(lambda edge, more: max(0, edge + more), edge, st.integers(-1, 1))
    lengths = draw(st.lists(past, min_size=1, max_size=2))
    tokens = draw(st.sampled_from([1, 1, 1, 2, 9, 33]))
    starts = [draw(st.sampled_from([0, 0, tokens // 2, tokens])) for _ in lengths]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Case.random(layout, draw(st.sampled_from([1, 2, 3])), lengths, starts, tokens, dtype)


@settings(max_examples=80)
@given(
    cases(),
    st.sampled_from([0.0, 0.0, 2.0]),
    st.sampled_from([0, 0, 1, 5, 40, 100]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
)
def test_it_is_the_reference(case: Case, softcap: float, sliding_window: int, splits: int, blocks: int) -> None:
    check(case, softcap, sliding_window, splits, blocks)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_heads_of_real_models(key_dim: int, value_dim: int, bits: int) -> None:
    group = 32 if value_dim % 32 == 0 else value_dim // 2
    key, value = Precision(bits, 32, 4), Precision(bits, group, 16 if bits % 2 else 4)
    layout = StateLayout(2, key_dim, value_dim, key, value, sinks=4, recent=32)
    case = Case.random(layout, 4, [131], [0], 1, torch.bfloat16)
    check(case, softcap=0.0, sliding_window=0, splits=2, blocks=1)


@pytest.mark.parametrize("length", [*range(94, 100), 126, 127, 128, 129, 190, 191, 192, 193])
def test_around_every_split(length: int) -> None:
    layout = StateLayout(1, 16, 16, Precision(2), Precision(3, 16, 4), sinks=0, recent=32)
    for splits in (2, 4, 8):
        check(Case.random(layout, 2, [length], [0], 1, torch.float32), 0.0, 0, splits, 1)


def test_a_tile_of_many_queries() -> None:
    layout = StateLayout(1, 16, 16, Precision(2), Precision(3, 16, 4), sinks=2, recent=32)
    case = Case.random(layout, 3, [100, 3], [0, 20], 50, torch.float32)
    for sliding_window in (0, 20):
        check(case, 0.0, sliding_window, 2, 2, query_tile=64)


def test_elements_beyond_half_precision_stay_finite() -> None:
    layout = StateLayout(1, 16, 16, Precision(2, 32, 4), Precision(2, 16, 4), sinks=0, recent=32)
    case = Case.random(layout, 1, [70], [0], 1, torch.float16)
    k, v = (torch.full((1, 1, 70, 16), 65504.0, dtype=torch.float16) for _ in range(2))
    k[..., ::2, :], v[..., ::2, :] = -60000.0, -60000.0
    nothing = torch.zeros(1, dtype=torch.int64)
    reference.append(k, v, nothing, nothing, *case.state.tensors(), layout.key, layout.value, layout.recent)
    check(replace(case, q=case.q * 1e-5), 0.0, 0, 2, 1)


@pytest.mark.parametrize(
    ("queries", "pairs", "most_tokens", "expected"),
    [
        (4, 8, 32768, (16, 1, 64)),
        (4, 1024, 32768, (16, 1, 1)),
        (4, 8, 128, (16, 1, 2)),
        (512, 8, 32768, (64, 8, 16)),
    ],
)
def test_a_launch_is_chosen_from_shapes(
    queries: int, pairs: int, most_tokens: int, expected: tuple[int, int, int]
) -> None:
    launch = triton_attend.Launch.choose(queries, pairs, most_tokens, widest=128, multiprocessors=132)
    assert (launch.query_tile, launch.query_tiles, launch.splits) == expected


def test_no_rows_give_no_output() -> None:
    layout = StateLayout(1, 16, 24, Precision(2), Precision(3, 8), sinks=2, recent=32)
    state = SiteState.allocate(layout, 0, 1, torch.float32)
    q = torch.empty(0, 2, 1, 16)
    none = torch.empty(0, dtype=torch.int64)
    output = triton_attend.attend(
        *(q, torch.empty(0, 1, 1, 16), torch.empty(0, 1, 1, 24), none, none, *state.tensors()),
        *(layout.key, layout.value, layout.recent, 1.0, 0.0, 0),
    )
    assert output.shape == (0, 2, 1, 24)
