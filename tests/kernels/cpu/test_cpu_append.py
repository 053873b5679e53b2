"""The CPU's append writes the reference's bytes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu import binding as cpu
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.packing import dequantize_block
from kvmix_compile.kernels.format.precision import BIT_WIDTHS, Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from tests.kernels.append_pair import Pair
from tests.kernels.covering import Combination, covering, named
from tests.kernels.every_pair import APPENDING, fits, layout_of, start_of, state_dtype_of
from tests.kernels.layouts import IMPORTANT_BITS, drawn_layouts, with_important_keys

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler, or KVMIX_CPU_KERNELS=0")

layouts = with_important_keys(
    drawn_layouts(
        st.builds(Precision, st.sampled_from(BIT_WIDTHS), st.sampled_from([8, 32]), st.sampled_from([4, 16])),
        st.builds(Precision, st.sampled_from(BIT_WIDTHS), st.just(8), st.sampled_from([4, 16])),
        key_dims=[16, 32, 40],
        value_dims=[16, 24],
        sinks=[0, 3, 40],
        recent=[32, 45],
    )
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("chosen", covering(APPENDING, fits), ids=named)
def test_every_two_choices_meet(chosen: Combination) -> None:
    pair = Pair(cpu.append, layout_of(chosen), 2, state_dtype_of(chosen))
    for tokens in chosen["chunks"]:
        chunk = [torch.randn(2, chosen["kv_heads"], tokens, dim).to(chosen["dtype"]) for dim in chosen["dimensions"]]
        pair.append(*chunk, torch.tensor([start_of(chosen, tokens), 0]))
    pair.check()


@settings(max_examples=200)
@given(layouts, dtypes, st.booleans(), st.booleans(), st.data())
def test_it_writes_the_bytes_of_the_reference(
    layout: StateLayout, dtype: torch.dtype, as_model: bool, grows: bool, data: st.DataObject
) -> None:
    pair = Pair(cpu.append, layout, 2, layout.unquantized_dtype(dtype) if as_model else dtype, grows=grows)
    for tokens in data.draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 20, 33, 70]), min_size=1, max_size=6)):
        starts = torch.tensor([data.draw(st.sampled_from([0, 0, tokens // 2, tokens])) for _ in range(2)])
        k, v = (
            torch.randn(2, tokens, layout.kv_heads, dim).to(dtype).transpose(1, 2)
            for dim in (layout.key_dim, layout.value_dim)
        )
        for row, start in enumerate(starts.tolist()):
            k[row, :, :start] = v[row, :, :start] = torch.nan
        pair.append(k, v, starts)
    pair.check()


def test_it_writes_them_with_narrower_vectors(narrower_vectors: None) -> None:
    for chosen in covering(APPENDING, fits):
        test_every_two_choices_meet(chosen)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_elements_of_every_size(bits: int, kept: torch.dtype) -> None:
    """Groups that are all alike, nearly so, of numbers too small or too large for half precision, and of none."""
    layout = StateLayout(
        SiteShape(1, 32, 32), key=Precision(bits, 32, 4), value=Precision(bits, 16, 16), sinks=0, recent=32
    )
    pair = Pair(cpu.append, layout, 1, kept)
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 1e-4, 1.0, 1e3, 7e4, 1e30]).repeat_interleave(4)
    k, v = torch.randn(2, 1, 1, 96, 32).unbind()
    k[..., 32:64, :] = 3.0
    v[..., 1::3, :] = -0.0
    pair.append(k * sizes, v * sizes[:, None].repeat(3, 1), torch.zeros(1, dtype=torch.int64))
    pair.check()


@pytest.mark.parametrize("scale_bits", [4, 16])
def test_what_is_no_number_is_read_as_none(scale_bits: int) -> None:
    """Wherever the reference's bytes are."""
    precision = Precision(2, 32, scale_bits)
    layout = StateLayout(SiteShape(1, 32, 32), key=precision, value=precision, sinks=0, recent=32)
    pair = Pair(cpu.append, layout, 1, torch.float32)
    k, v = torch.randn(2, 1, 1, 96, 32).unbind()
    k[..., 5, 3] = v[..., 40, 20] = torch.nan
    pair.append(k, v, torch.zeros(1, dtype=torch.int64))
    for name, axis in (("packed_k", Axis.TOKENS), ("packed_v", Axis.CHANNELS)):
        expected, written = (
            dequantize_block(getattr(state, name), precision, axis, 32, torch.float32)
            for state in (pair.expected, pair.written)
        )
        assert expected.isnan().any() and torch.equal(written.isnan(), expected.isnan())


@pytest.mark.parametrize("scale_bits", [4, 16])
@pytest.mark.parametrize(("important_bits", "bits"), [*(((), bits) for bits in BIT_WIDTHS), *IMPORTANT_BITS])
def test_token_by_token(important_bits: tuple[int, ...], bits: int, scale_bits: int) -> None:
    key, value = Precision(bits, 32, scale_bits, important_bits), Precision(bits, 24, scale_bits)
    layout = StateLayout(SiteShape(1, 32, 24), key=key, value=value, sinks=5, recent=32)
    pair = Pair(cpu.append, layout, 1, torch.float32, most_tokens=105)
    k, v, start = torch.randn(1, 1, 105, 32), torch.randn(1, 1, 105, 24), torch.zeros(1, dtype=torch.int64)
    for token in range(105):
        pair.append(k[:, :, token : token + 1], v[:, :, token : token + 1], start)
    assert pair.written.packed_k.any(-1).all() and pair.written.packed_v.any(-1).all()
    pair.check()


def test_no_token_reaches_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: Any) -> None:
        raise AssertionError

    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=2, recent=32)
    state = SiteState.allocate(layout, 1, 1, torch.float32)
    token, nothing = torch.ones(1, 1, 1, 16), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(reference, "append", unexpected)
    for length in range(40):
        chunk = Chunk(key=token, value=token, lengths=nothing + length, starts=nothing)
        cpu.append(chunk, state, layout.storage)
    assert state.sink_k.all() and state.recent_v.all() and state.packed_k.any()


def test_without_room_nothing_is_written() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=0, recent=32)
    state = SiteState.allocate(layout, 1, 0, torch.float32)
    token, nothing = torch.ones(1, 1, 1, 16), torch.zeros(1, dtype=torch.int64)
    for length in (32, 40):
        chunk = Chunk(key=token, value=token, lengths=nothing + length, starts=nothing)
        with pytest.raises(KVMixError, match="room for 1 packed blocks"):
            cpu.append(chunk, state, layout.storage)
    assert not any(tensor.any() for tensor in state.tensors())
