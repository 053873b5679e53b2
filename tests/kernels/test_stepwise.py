"""attend_stepwise: however a text is cut, what its tokens read and leave is as if they had come one by one."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu import binding
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import ENDLESS, SiteState, StateLayout, packed_blocks
from kvmix_compile.kernels.stepwise import Attend, slots_before, stepwise
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.layouts import drawn_layouts, with_important_keys

KERNELS = {
    "reference": stepwise(reference.attend, reference.append),
    "cpu": stepwise(binding.attend, binding.append),
}
LONGEST = 150


@dataclass(frozen=True)
class Text:
    """Rows of one length, padding of their own before them, and where the text is cut."""

    layout: StateLayout
    weighting: Weighting
    q: Tensor
    k: Tensor
    v: Tensor
    padding: list[int]
    cuts: list[int]

    def read(self, kernel: Attend, cuts: list[int]) -> tuple[Tensor, SiteState]:
        """What is attended, and the state that is left."""
        rows, tokens = len(self.padding), self.q.shape[2]
        state = SiteState.allocate(self.layout, rows, self.layout.capacity_blocks(tokens), torch.float32)
        lengths, outputs = torch.zeros(rows, dtype=torch.int64), []
        for first, end in zip([0, *cuts], [*cuts, tokens], strict=True):
            starts = torch.tensor([min(max(0, padding - first), end - first) for padding in self.padding])
            chunk = Chunk(key=self.k[:, :, first:end], value=self.v[:, :, first:end], lengths=lengths, starts=starts)
            given = self.q[:, :, first:end], chunk, state, self.layout.storage, self.weighting
            outputs.append(kernel(*given))
            lengths = lengths + (end - first) - starts
        return torch.cat(outputs, dim=2), state


precisions = st.builds(Precision, st.sampled_from([1, 2, 3, 8, 16]), st.just(16), st.sampled_from([4, 16]))
layouts = with_important_keys(
    drawn_layouts(precisions, precisions, key_dims=[16], value_dims=[16, 48], sinks=[0, 3, 32], recent=[32, 45])
)


@st.composite
def texts(draw: st.DrawFn) -> Text:
    layout = draw(layouts)
    chunked = draw(st.booleans()) and layout.window > 1
    weighting = Weighting(
        0.25,
        sliding_window=0 if chunked else layout.window,
        attention_chunk=layout.window if chunked else 0,
    )
    tokens, rows = draw(st.integers(2, LONGEST)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 9)))
    heads = layout.kv_heads
    shapes = ((2 * heads, layout.key_dim), (heads, layout.key_dim), (heads, layout.value_dim))
    q, k, v = (torch.randn(rows, tokens, count, dim).transpose(1, 2) for count, dim in shapes)
    padding = draw(st.lists(st.sampled_from([0, 0, 5, tokens]), min_size=rows, max_size=rows))
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=4)))
    return Text(layout, weighting, q, k, v, padding, cuts)


@settings(max_examples=60)
@given(texts(), st.sampled_from(list(KERNELS)))
def test_however_a_text_is_cut_it_is_read_as_token_by_token(text: Text, kernel: str) -> None:
    tokens = text.q.shape[2]
    expected, its_state = text.read(KERNELS["reference"], list(range(1, tokens)))
    found, state = text.read(KERNELS[kernel], text.cuts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(state.tensors(), its_state.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def one_text(layout: StateLayout, tokens: int = 120) -> Text:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, 16) for _ in range(3))
    return Text(layout, Weighting(0.25, sliding_window=layout.window), q, k, v, [0], [])


COARSE = StateLayout(SiteShape(1, 16, 16), key=Precision(2, 16, 16), value=Precision(2, 16, 16), sinks=0, recent=32)


def test_a_chunk_that_is_attended_at_once_is_read_otherwise() -> None:
    """What this is for: attend alone shows a prompt itself in full precision."""
    text = one_text(COARSE)

    def at_once(query: Tensor, chunk: Chunk, *others) -> Tensor:
        attended = reference.attend(query, chunk, *others)
        reference.append(chunk, *others[:2])
        return attended

    expected, _ = text.read(KERNELS["reference"], list(range(1, 120)))
    found, _ = text.read(at_once, [])
    assert (found - expected)[:, :, :33].abs().max() < 1e-5
    assert (found - expected)[:, :, 33:].abs().max() > 0.05


@pytest.mark.parametrize(
    "layout",
    [
        StateLayout(SiteShape(1, 16, 16), key=Precision(16), value=Precision(16), sinks=0, recent=32),
        StateLayout(
            SiteShape(1, 16, 16, window=40), key=Precision(16), value=Precision(16), sinks=0, recent=ENDLESS
        ),
    ],
    ids=["16 bits", "a window that is kept whole"],
)  # fmt: skip
def test_what_is_stored_as_it_is_is_read_in_one_piece(layout: StateLayout) -> None:
    calls = []

    def counted(query: Tensor, *others) -> Tensor:
        calls.append(query.shape[2])
        return reference.attend(query, *others)

    one_text(layout).read(stepwise(counted, reference.append), [50])
    assert calls == [50, 70]


@given(held=st.integers(0, 300), tokens=st.integers(1, 300), sinks=st.sampled_from([0, 4, 64]))
def test_all_tokens_of_a_piece_find_the_same_blocks_packed(held: int, tokens: int, sinks: int) -> None:
    recent = 40
    before = slots_before(held, sinks + recent)
    assert 0 <= before < BLOCK_TOKENS
    for first in range(-before, tokens, BLOCK_TOKENS):
        piece = range(max(0, first), min(tokens, first + BLOCK_TOKENS))
        assert len({packed_blocks(held + token, sinks, recent) for token in piece}) == 1
