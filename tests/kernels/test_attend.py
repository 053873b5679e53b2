"""attend against plain float64 attention over the tokens, each fetched from where state.py says it lies."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.packing import dequantize_block
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import ENDLESS, SiteState, StateLayout
from kvmix_compile.kernels.reference import append, attend
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import Case, weighted
from tests.kernels.layouts import drawn_layouts, with_important_keys

precisions = st.builds(
    Precision, st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([8, 16]), st.sampled_from([4, 16])
)
layouts = with_important_keys(
    drawn_layouts(
        precisions,
        precisions,
        key_dims=[16, 48, 64],
        value_dims=[16, 48],
        sinks=[0, 3, 32],
        recent=[32, 45],
        windows=[0],
    )
)


PLAIN = Weighting(0.25)


def attended(case: Case, weighting: Weighting) -> Tensor:
    return attend(*case.arguments(weighting))


def stored(case: Case, row: int, head: int, token: int, axis: Axis) -> Tensor:
    """One token's key or value as the state has it."""
    layout, state = case.layout, case.state
    sink, packed, ring, precision, dim = (
        (state.sink_k, state.packed_k, state.recent_k, layout.key, layout.key_dim)
        if axis == Axis.TOKENS
        else (state.sink_v, state.packed_v, state.recent_v, layout.value, layout.value_dim)
    )
    beyond_sinks = token - layout.sinks
    if beyond_sinks < 0:
        return sink[row, head, token]
    waiting = int(case.lengths[row]) - layout.sinks - layout.recent
    blocks = -(-waiting // 32) if waiting > 0 else 0
    if beyond_sinks < 32 * blocks:
        # What has lost its place is seen by nothing, so that it does not matter what stands for it.
        place = beyond_sinks // 32 % packed.shape[2] if packed.shape[2] else None
        if place is None:
            return torch.zeros(dim)
        return dequantize_block(packed[row, head, place], precision, axis, dim, sink.dtype)[beyond_sinks % 32]
    return ring[row, head, beyond_sinks % layout.recent_slots]


def expected(case: Case, weighting: Weighting) -> Tensor:
    batch, query_heads, tokens, _ = case.q.shape
    shared = query_heads // case.layout.kv_heads
    output = torch.zeros(batch, query_heads, tokens, case.layout.value_dim, dtype=torch.float64)
    for row in range(batch):
        length, start = int(case.lengths[row]), int(case.starts[row])
        index = torch.arange(length + tokens - start)
        for head in range(case.layout.kv_heads):
            keys = [stored(case, row, head, token, Axis.TOKENS) for token in range(length)]
            values = [stored(case, row, head, token, Axis.CHANNELS) for token in range(length)]
            keys_of_row = torch.stack([*keys, *case.k[row, head, start:]]).double() if len(index) else None
            if keys_of_row is None:
                continue
            values_of_row = torch.stack([*values, *case.v[row, head, start:]]).double()
            if case.q.shape[-1] > case.layout.key_dim:
                keys_of_row = torch.cat([values_of_row, keys_of_row], dim=-1)
            for query_head in range(head * shared, (head + 1) * shared):
                for place in range(start, tokens):
                    t = length + place - start
                    logits = keys_of_row @ case.q[row, query_head, place].double() * weighting.scale
                    if weighting.softcap:
                        logits = weighting.softcap * torch.tanh(logits / weighting.softcap)
                    visible = index <= t
                    if weighting.sliding_window:
                        visible &= index > t - weighting.sliding_window
                    if weighting.attention_chunk:
                        visible &= index // weighting.attention_chunk == t // weighting.attention_chunk
                    if weighting.slopes is not None:
                        logits += weighting.slopes[query_head] * (index - t)
                    weights = logits.masked_fill(~visible, -torch.inf).exp()
                    total = weights.sum()
                    if weighting.sink_logits is not None:
                        total += weighting.sink_logits[query_head].exp()
                    output[row, query_head, place] = weights / total @ values_of_row
    return output


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(layouts)
    first_full = layout.sinks + layout.recent
    edges = [0, 1, layout.sinks, first_full, first_full + 1, first_full + 32, first_full + 33, first_full + 64]
    past = st.sampled_from(edges).flatmap(lambda edge: st.integers(max(0, edge - 1), edge + 1))
    batch = draw(st.integers(1, 3))
    tokens = draw(st.sampled_from([1, 1, 2, 9, 34]))
    lengths = draw(st.lists(past, min_size=batch, max_size=batch))
    starts = draw(st.lists(st.sampled_from([0, 0, tokens // 2, tokens]), min_size=batch, max_size=batch))
    shared, values_are_keys = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([False, False, True]))
    return Case.random(layout, shared, lengths, starts, tokens, torch.float32, values_are_keys)


@settings(max_examples=200)
@given(weighted(cases()))
def test_attend_is_attention_over_what_is_stored(example: tuple[Case, Weighting]) -> None:
    case, weighting = example
    output = attended(case, weighting)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), expected(case, weighting), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 24, 33])
@pytest.mark.parametrize("kind", ["sliding_window", "attention_chunk"])
def test_a_window_alone(window: int, kind: str) -> None:
    """Of states that pack nothing and keep what is seen."""
    weighting = Weighting(0.25, **{kind: window})
    for lengths, tokens, rollback in (([0, 1], 1, 0), ([23, 24], 9, 0), ([25, 80], 1, 5), ([100, 33], 40, 5)):
        layout = StateLayout(
            SiteShape(2, 16, 16, window=window),
            key=Precision(2),
            value=Precision(2, 16),
            sinks=0,
            recent=ENDLESS,
            rollback=rollback,
        )
        case = Case.random(layout, 2, lengths, [0, tokens // 2], tokens, torch.float32)
        assert case.state.recent_k.shape[2] == max(1, window - 1) + rollback
        for back in (0, rollback):
            shorter = replace(case, lengths=(case.lengths - back).clamp(min=0))
            output = attended(shorter, weighting)
            torch.testing.assert_close(output.double(), expected(shorter, weighting), rtol=1e-4, atol=1e-5)
            assert torch.equal(output, attended(shorter.poisoned(), weighting))


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    for key in (Precision(3, 32, 4), Precision(2, 32, 4, important_bits=(4, 4))):
        layout = StateLayout(SiteShape(2, 32, 32), key=key, value=Precision(2, 32), sinks=4, recent=32)
        case = Case.random(layout, 2, [120, 37], [0, tokens // 2], tokens, dtype)
        by_head = torch.tensor([0.3, -0.2, 0.1, 0.5])
        for weighting in (
            PLAIN,
            Weighting(0.25, softcap=5.0),
            Weighting(0.25, sliding_window=50),
            Weighting(0.25, sink_logits=by_head.to(dtype)),
            Weighting(0.25, slopes=by_head),
        ):
            output = attended(case, weighting)
            assert output.dtype == dtype
            torch.testing.assert_close(output.double(), expected(case, weighting), rtol=tolerance, atol=tolerance)


@settings(max_examples=30)
@given(weighted(cases()))
def test_what_lies_in_unused_memory_does_not_matter(example: tuple[Case, Weighting]) -> None:
    case, weighting = example
    assert torch.equal(attended(case.poisoned(), weighting), attended(case, weighting))


LONG_CHUNKS = {
    "plain": PLAIN,
    "soft cap": Weighting(0.25, softcap=3.0),
    "window": Weighting(0.25, sliding_window=20),
    "chunks": Weighting(0.25, attention_chunk=20),
    "sink logits": Weighting(0.25, sink_logits=torch.tensor([0.5, -1.0])),
    "slopes": Weighting(0.25, slopes=torch.tensor([0.5, 0.01])),
}


@pytest.mark.parametrize("name", LONG_CHUNKS)
def test_long_chunks_are_attended_to_in_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=2, recent=32)
    case = Case.random(layout, 2, [90, 0], [0, 3], 30, torch.float32)
    in_one = attended(case, LONG_CHUNKS[name])
    monkeypatch.setattr(reference, "MAX_SCORE_ELEMENTS", 1000)
    torch.testing.assert_close(attended(case, LONG_CHUNKS[name]), in_one)


def test_unquantized_chunks_add_up_to_ordinary_attention() -> None:
    layout = StateLayout(SiteShape(2, 16, 16), key=Precision(16), value=Precision(16), sinks=4, recent=32)
    q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)
    state = SiteState.allocate(layout, 2, layout.required_blocks(200), torch.float32)
    outputs, begin = [], 0
    for size in (70, 1, 1, 64, 3, 61):
        end = begin + size
        lengths, starts = torch.full((2,), begin), torch.zeros(2, dtype=torch.int64)
        case = Case(layout, state, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], lengths, starts)
        outputs.append(attended(case, PLAIN))
        append(case.chunk, state, layout.storage)
        begin = end
    ordinary = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(torch.cat(outputs, dim=2), ordinary)


def test_a_row_can_be_shortened_by_as_many_tokens_as_its_layout_allows() -> None:
    layout = StateLayout(
        SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16), sinks=2, recent=32, rollback=20
    )
    long = Case.random(layout, 1, [131], [0], 4, torch.float32)
    ring = long.state.recent_k, long.state.recent_v
    tokens = [(u - layout.sinks) % layout.recent_slots for u in range(131 - layout.recent_slots, 111)]
    short_window = [torch.zeros_like(side) for side in ring]
    for short, side in zip(short_window, ring, strict=True):
        short[:, :, tokens] = side[:, :, tokens]
    alone = replace(long.state, recent_k=short_window[0], recent_v=short_window[1])
    shortened = replace(long, lengths=torch.tensor([111]))
    output = attended(shortened, PLAIN)
    assert torch.equal(output, attended(replace(shortened, state=alone), PLAIN))
    torch.testing.assert_close(output.double(), expected(shortened, PLAIN), rtol=1e-4, atol=1e-5)


def test_a_window_and_chunks_exclude_each_other() -> None:
    with pytest.raises(KVMixError, match="not both"):
        Weighting(1.0, sliding_window=3, attention_chunk=4)
