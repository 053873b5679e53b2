"""What a state occupies, and how its rows and blocks are rearranged."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import (
    ENDLESS,
    Room,
    SiteState,
    StateLayout,
    is_packed,
    packed_blocks,
    required_blocks,
    unpacked_tokens,
    visible_blocks,
)
from tests.kernels.layouts import with_window

LAYOUT = StateLayout(
    SiteShape(2, 16, 8), key=Precision(3, 16, 4), value=Precision(2, 8), sinks=4, recent=32, rollback=5
)


def random_state(batch: int, room: Room) -> SiteState:
    state = SiteState.with_room(LAYOUT, batch, room, torch.float32)
    for tensor in state.tensors():
        tensor.view(torch.uint8).random_(0, 256)
    return state


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


@given(st.integers(0, 500), st.integers(0, 70), st.integers(32, 200))
def test_the_recent_window_keeps_the_recent_tokens_and_never_more(length: int, sinks: int, recent: int) -> None:
    blocks = packed_blocks(length, sinks, recent)
    unpacked = length - sinks - 32 * blocks
    assert unpacked <= recent
    assert blocks == 0 or unpacked >= recent - 31
    assert required_blocks(length, sinks, recent) == blocks
    assert packed_blocks(torch.tensor([length, 0]), sinks, recent).tolist() == [blocks, 0]


@given(st.integers(1, 300), st.integers(0, 40), st.integers(32, 100), st.integers(0, 30))
def test_of_a_window_there_is_room_for_what_can_be_seen_and_no_more(
    window: int, sinks: int, recent: int, rollback: int
) -> None:
    most = 0
    for length in range(sinks + recent + window + rollback + 64):
        earliest = max(0, length - rollback - window + 1 - sinks)
        most = max(most, packed_blocks(length, sinks, recent) - earliest // 32)
    assert visible_blocks(window, recent, rollback) == most
    layout = replace(with_window(LAYOUT, window), sinks=sinks, recent=recent, rollback=rollback)
    for length in (0, sinks + recent + 1, 500, 10_000):
        needed = min(packed_blocks(length, sinks, recent), most)
        assert layout.required_blocks(length) == needed
        assert needed <= layout.capacity_blocks(length) <= most


@pytest.mark.parametrize(("window", "packed"), [(0, True), (1, False), (129, False), (130, True)])
def test_a_window_of_recent_tokens_is_kept_alone(window: int, packed: bool) -> None:
    sinks, recent = unpacked_tokens(window, 64, 128)
    assert is_packed(window, 128) == packed and (sinks, recent) == ((64, 128) if packed else (0, ENDLESS))
    layout = replace(with_window(LAYOUT, window), sinks=sinks, recent=recent, rollback=5)
    assert layout.recent_slots == (133 if packed else max(1, window - 1) + 5)
    assert (layout.capacity_blocks(10_000) == 0) != packed


def test_a_row_can_be_shortened_while_what_it_needs_is_kept() -> None:
    alone = replace(with_window(LAYOUT, 20), sinks=0, recent=ENDLESS, rollback=5)
    assert alone.can_shorten(100, 95) and not alone.can_shorten(100, 94)
    assert alone.can_shorten(24, 0) and alone.can_shorten(100, 0)
    packing = with_window(LAYOUT, 60)  # sinks 4, recent 32, rollback 5; of 100 tokens two blocks are packed
    assert packing.can_shorten(100, 95) and not packing.can_shorten(100, 60)


@given(
    st.builds(Precision, st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([8, 16, 32]), st.sampled_from([4, 16])),
    st.builds(Precision, st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([8, 16, 32]), st.sampled_from([4, 16])),
    st.sampled_from([8, 24, 64]),
    st.sampled_from([32, 96]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_layout_predicts_what_its_tensors_occupy(
    key: Precision, value: Precision, key_dim: int, value_dim: int, batch: int, blocks: int, dtype: torch.dtype
) -> None:
    layout = StateLayout(SiteShape(2, key_dim, value_dim), key=key, value=value, sinks=5, recent=33, rollback=3)
    for room in (layout.whole(blocks), layout.room(8)):
        state = SiteState.with_room(layout, batch, room, dtype)
        assert state.nbytes == layout.bytes(batch, room, dtype)
        assert state.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in state.tensors())
        assert (state.batch, state.room) == (batch, room)
        assert not any(tensor.any() for tensor in state.tensors())


@st.composite
def layouts(draw: st.DrawFn) -> StateLayout:
    window, rollback = draw(st.sampled_from([0, 0, 1, 20, 60, 300])), draw(st.sampled_from([0, 0, 5, 40]))
    sinks, recent = unpacked_tokens(window, draw(st.integers(0, 70)), draw(st.integers(32, 140)))
    return replace(with_window(LAYOUT, window), sinks=sinks, recent=recent, rollback=rollback)


@given(layouts(), st.integers(0, 600))
def test_room_grows_with_the_text_and_no_token_ever_moves(layout: StateLayout, length: int) -> None:
    room, required = layout.room(length), layout.required_room(length)
    whole = layout.whole(layout.capacity_blocks(length))
    assert whole.covers(room) and room.covers(required) and room.covers(layout.room(max(0, length - 1)))
    # What grows lies where it will lie in the end: sinks are whole before any token is beyond them, the recent window
    # before it wraps, and both but for what can be taken back before anything is packed.
    assert room.sinks == layout.sinks or (room.slots == room.blocks == 0 and length <= room.sinks)
    assert room.slots == layout.recent_slots or length - layout.sinks <= room.slots
    assert room.blocks == 0 or room.slots > min(layout.recent, layout.recent_slots - 1)
    assert layout.room(length, begins_whole=True) == whole


@given(layouts(), st.integers(1, 400))
def test_unquantized_tokens_have_room_for_a_sixteenth_more_at_most(layout: StateLayout, length: int) -> None:
    room = layout.room(length)
    assert 16 * (room.sinks + room.slots) <= 17 * length


def test_growing_keeps_what_is_stored() -> None:
    state = random_state(batch=2, room=Room(2, 1, 3))
    before = [tensor.clone() for tensor in state.tensors()]
    for room in (Room(3, 3, 3), Room(2, 2, 7)):
        state.grow(room)
    assert state.room == Room(3, 3, 7)
    assert state.nbytes == LAYOUT.bytes(2, Room(3, 3, 7), torch.float32)
    for old, new in zip(before, state.tensors(), strict=True):
        assert as_bytes(new[:, :, : old.shape[2]]) == as_bytes(old)
        assert not new[:, :, old.shape[2] :].any()


def test_rows_are_reordered_repeated_and_dropped() -> None:
    state = random_state(batch=3, room=LAYOUT.room(5))
    before = [tensor.clone() for tensor in state.tensors()]
    state.select_rows(torch.tensor([2, 0, 2, 2]))
    assert state.batch == 4
    for old, new in zip(before, state.tensors(), strict=True):
        assert as_bytes(new) == as_bytes(old[[2, 0, 2, 2]])


@pytest.mark.parametrize(
    "change",
    [
        {"recent": 31},
        {"sinks": -1},
        {"rollback": -1},
        {"shape": SiteShape(2, 16, 8, window=-1)},
        {"recent": ENDLESS},
        {"shape": SiteShape(2, 12, 8)},
    ],
)
def test_a_layout_that_cannot_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(KVMixError):
        replace(LAYOUT, **change)
