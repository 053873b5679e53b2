"""The state is a function of each row's tokens: not of the chunks they came in, nor of the rows beside it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.packing import quantize_block
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import ENDLESS, SiteState, StateLayout
from kvmix_compile.kernels.reference import append
from tests.kernels.layouts import IMPORTANT_BITS, drawn_layouts, with_important_keys, with_window

precisions = st.builds(
    Precision, st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([8, 16]), st.sampled_from([4, 16])
)
layouts = with_important_keys(
    drawn_layouts(precisions, precisions, key_dims=[24, 32], value_dims=[16], sinks=[0, 3, 32, 40], recent=[32, 45, 64])
)
# Those of windows also as states that pack nothing and keep the window alone.
all_layouts = layouts.flatmap(
    lambda layout: (
        st.sampled_from([layout, replace(layout, sinks=0, recent=ENDLESS)]) if layout.window else st.just(layout)
    )
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_tokens(layout: StateLayout, batch: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Keys and values; transposed as a model's projections are."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, layout.kv_heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for dim in (layout.key_dim, layout.value_dim)
    ]


def empty_state(layout: StateLayout, batch: int, length: int, dtype: torch.dtype) -> SiteState:
    return SiteState.allocate(layout, batch, layout.required_blocks(length), dtype)


def append_chunk(layout: StateLayout, state: SiteState, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor) -> None:
    append(Chunk(key=k, value=v, lengths=lengths, starts=starts), state, layout.storage)


def append_in_chunks(layout: StateLayout, state: SiteState, k: Tensor, v: Tensor, cuts: list[int]) -> None:
    """Rows of equal length, without padding, cut before these tokens."""
    edges = [0, *sorted(cuts), k.shape[2]]
    for begin, end in zip(edges, edges[1:], strict=False):
        lengths = torch.full((k.shape[0],), begin)
        append_chunk(layout, state, k[:, :, begin:end], v[:, :, begin:end], lengths, torch.zeros_like(lengths))


def assert_same_bytes(one: SiteState, other: SiteState) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=150)
@given(all_layouts, dtypes, st.integers(0, 260), st.data())
def test_any_chunking_gives_the_same_bytes(
    layout: StateLayout, dtype: torch.dtype, length: int, data: st.DataObject
) -> None:
    k, v = random_tokens(layout, 2, length, dtype)
    whole, chunked = (empty_state(layout, 2, length, dtype) for _ in range(2))
    append_in_chunks(layout, whole, k, v, [])
    append_in_chunks(layout, chunked, k, v, data.draw(st.lists(st.integers(0, length), max_size=12), label="cuts"))
    assert_same_bytes(whole, chunked)


@settings(max_examples=100)
@given(all_layouts, dtypes, st.integers(0, 260), st.data())
def test_a_state_that_grew_has_the_bytes_of_one_allocated_whole(
    layout: StateLayout, dtype: torch.dtype, length: int, data: st.DataObject
) -> None:
    """Two rows, the second with padding: whatever chunks the text came in, the state has the room of its tokens."""
    k, v = random_tokens(layout, 2, length, dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=12), label="cuts"))
    padding = torch.tensor([0, data.draw(st.integers(0, length), label="padding")])
    whole, grown = empty_state(layout, 2, length, dtype), SiteState.with_room(layout, 2, layout.room(0), dtype)
    for begin, end in pairwise([0, *cuts, length]):
        grown.grow(layout.room(end))
        for state in (whole, grown):
            lengths, starts = (begin - padding).clamp(min=0), (padding - begin).clamp(0, end - begin)
            append_chunk(layout, state, k[:, :, begin:end], v[:, :, begin:end], lengths, starts)
    assert grown.room == layout.room(length)
    for room in (whole.room, grown.room):
        whole.grow(room), grown.grow(room)
    assert_same_bytes(whole, grown)


@settings(max_examples=100)
@given(layouts, st.integers(0, 400), st.data())
def test_of_a_window_the_last_blocks_are_kept(layout: StateLayout, length: int, data: st.DataObject) -> None:
    k, v = random_tokens(layout, 2, length, torch.float32)
    of_all, of_window = with_window(layout, 0), with_window(layout, layout.window or 64)
    whole, last = (empty_state(of, 2, length, torch.float32) for of in (of_all, of_window))
    append_in_chunks(of_all, whole, k, v, [])
    append_in_chunks(of_window, last, k, v, data.draw(st.lists(st.integers(0, length), max_size=12), label="cuts"))
    blocks = whole.blocks
    for block in range(max(0, blocks - last.blocks), blocks):
        for kept, packed in ((last.packed_k, whole.packed_k), (last.packed_v, whole.packed_v)):
            assert torch.equal(kept[:, :, block % last.blocks], packed[:, :, block])


@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize(("important_bits", "bits"), [*(((), bits) for bits in (1, 2, 3, 4, 8, 16)), *IMPORTANT_BITS])
def test_token_by_token_gives_the_same_bytes(important_bits: tuple[int, ...], bits: int, scale_bits: int) -> None:
    key, value = Precision(bits, 32, scale_bits, important_bits), Precision(bits, 8, scale_bits)
    layout = StateLayout(
        SiteShape(2, 32 if important_bits else 24, 16), key=key, value=value, sinks=5, recent=40, rollback=3
    )
    k, v = random_tokens(layout, 1, 150, torch.float32)
    whole, chunked = (empty_state(layout, 1, 150, torch.float32) for _ in range(2))
    append_in_chunks(layout, whole, k, v, [])
    append_in_chunks(layout, chunked, k, v, list(range(1, 150)))
    assert_same_bytes(whole, chunked)


@settings(max_examples=100)
@given(all_layouts, dtypes, st.data())
def test_a_row_of_a_padded_and_reordered_batch_has_the_bytes_it_has_alone(
    layout: StateLayout, dtype: torch.dtype, data: st.DataObject
) -> None:
    batch = 3
    state = empty_state(layout, batch, 330, dtype)
    lengths = torch.zeros(batch, dtype=torch.int64)
    histories: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]
    for step in range(data.draw(st.integers(1, 3), label="chunks")):
        size = data.draw(st.sampled_from([1, 2, 50, 110]), label="size")
        starts = torch.tensor([data.draw(st.sampled_from([0, 1, size // 3, size])) for _ in range(batch)])
        k, v = random_tokens(layout, batch, size, dtype, seed=step)
        for row, start in enumerate(starts.tolist()):
            histories[row].append((k[row, :, start:].clone(), v[row, :, start:].clone()))
            k[row, :, :start] = v[row, :, :start] = torch.nan
        append_chunk(layout, state, k, v, lengths, starts)
        lengths = lengths + size - starts
        order = torch.tensor(data.draw(st.sampled_from([[0, 1, 2], [2, 0, 1], [1, 1, 0]])))
        state.select_rows(order)
        lengths = lengths[order]
        histories = [list(histories[row]) for row in order.tolist()]
    for row, history in enumerate(histories):
        alone = empty_state(layout, 1, 330, dtype)
        k, v = (torch.cat(pieces, dim=1).unsqueeze(0) for pieces in zip(*history, strict=True))
        append_in_chunks(layout, alone, k, v, [])
        state_of_row = SiteState(*(tensor[row : row + 1].contiguous() for tensor in state.tensors()))
        assert_same_bytes(state_of_row, alone)


def test_every_token_lies_where_it_is_said_to() -> None:
    layout = StateLayout(
        SiteShape(1, 8, 8), key=Precision(2, 32), value=Precision(3, 8, 4), sinks=4, recent=40, rollback=2
    )
    k, v = random_tokens(layout, 1, 110, torch.float32)
    state = empty_state(layout, 1, 110, torch.float32)
    append_in_chunks(layout, state, k, v, [7, 60])
    assert torch.equal(state.sink_k, k[:, :, :4])
    # 110 tokens less 4 sinks and 40 recent ones leave 66, which take three blocks.
    assert torch.equal(state.packed_k[0, 0, 2], quantize_block(k[0, 0, 68:100], layout.key, Axis.TOKENS))
    assert torch.equal(state.packed_v[0, 0, 1], quantize_block(v[0, 0, 36:68], layout.value, Axis.CHANNELS))
    for token in range(110 - 42, 110):
        assert torch.equal(state.recent_v[0, 0, (token - 4) % 42], v[0, 0, token])


def test_without_room_nothing_is_written() -> None:
    layout = StateLayout(SiteShape(1, 8, 8), key=Precision(2), value=Precision(2, 8), sinks=0, recent=32)
    k, v = random_tokens(layout, 2, 100, torch.float32)
    state = SiteState.allocate(layout, 2, 2, torch.float32)
    # The second row has 97 tokens, one more than fit beside two blocks.
    with pytest.raises(KVMixError, match="97 tokens need room for 3 packed blocks .* room for 2"):
        append_chunk(layout, state, k, v, torch.tensor([0, 0]), torch.tensor([60, 3]))
    assert not any(tensor.any() for tensor in state.tensors())
    append_chunk(layout, state, k, v, torch.tensor([0, 0]), torch.tensor([60, 4]))
