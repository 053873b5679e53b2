"""What a kernel of attend is tried on, whatever the device: rows with a past, and a chunk that follows it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout, packed_blocks
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.engine import Engine
from tests.kernels.layouts import with_important_keys, with_window

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
        cls,
        layout: StateLayout,
        shared: int,
        lengths: list[int],
        starts: list[int],
        tokens: int,
        dtype: torch.dtype,
        values_are_keys: bool = False,
    ) -> "Case":
        def draw(heads: int, count: int, dim: int) -> Tensor:
            return torch.randn(len(lengths), count, heads, dim).to(dtype).transpose(1, 2)

        longest, heads = max(lengths), layout.kv_heads
        state = SiteState.allocate(layout, len(lengths), layout.required_blocks(longest) + 2, dtype)
        k, v = draw(heads, longest, layout.key_dim), draw(heads, longest, layout.value_dim)
        padding = torch.tensor([longest - length for length in lengths])
        past = Chunk(key=k, value=v, lengths=torch.zeros_like(padding), starts=padding)
        reference.append(past, state, layout.storage)
        query_dim = layout.key_dim + (layout.value_dim if values_are_keys else 0)
        chunk = draw(heads * shared, tokens, query_dim), draw(heads, tokens, layout.key_dim)
        return cls(
            layout, state, *chunk, draw(heads, tokens, layout.value_dim), torch.tensor(lengths), torch.tensor(starts)
        )

    @property
    def chunk(self) -> Chunk:
        return Chunk(key=self.k, value=self.v, lengths=self.lengths, starts=self.starts)

    def arguments(self, weighting: Weighting | None = None) -> tuple[Tensor, Chunk, SiteState, Storage, Weighting]:
        """Of attend; plain attention unless said otherwise."""
        weighting = weighting or Weighting(self.q.shape[-1] ** -0.5)
        return self.q, self.chunk, self.state, self.layout.storage, weighting

    def paged_arguments(
        self, page: tuple[int, int], weighting: Weighting | None = None, device: str | None = None
    ) -> tuple[Tensor, Chunk, Pages, Storage, Weighting]:
        """The same with pages, of so many tokens and so many blocks, that hold no more than is seen; or copies of them
        on a device.
        """
        q, chunk, state, storage, weighting = self.arguments(weighting)
        lengths, starts = self.lengths.tolist(), self.starts.tolist()
        engine = Engine(self.layout, len(lengths), q.dtype, page, most_tokens=max([*lengths, 1]))
        # A row of padding alone sees nothing.
        first = [
            weighting.first_visible(length) if start < q.shape[2] else length
            for length, start in zip(lengths, starts, strict=True)
        ]
        engine.hold(state, lengths, first)
        return q, chunk, engine.pages(lengths, lengths, device), storage, weighting

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """The same with every tensor changed."""
        state = SiteState(*map(change, self.state.tensors()))
        changed = {name: change(getattr(self, name)) for name in ("q", "k", "v", "lengths", "starts")}
        return replace(self, state=state, **changed)

    def in_window(self, window: int) -> "Case":
        """The same with those packed blocks alone that tokens which see `window` tokens need, where state.py has them:
        the fewest that there can be room for.
        """
        layout = with_window(self.layout, window)
        room = layout.required_blocks(int(self.lengths.max()))
        state = replace(self.state)
        for name in ("packed_k", "packed_v"):
            of_all = getattr(self.state, name)
            kept = of_all.new_full((*of_all.shape[:2], room, of_all.shape[3]), 0xFF)
            for row, length in enumerate(self.lengths.tolist()):
                for block in range(packed_blocks(length, layout.sinks, layout.recent) if room else 0):
                    kept[row, :, block % room] = of_all[row, :, block]
            setattr(state, name, kept)
        return replace(self, layout=layout, state=state)

    def as_grown(self, least_slots: int = 0) -> "Case":
        """The same in a state that has grown with its rows and has no more room than they and the chunk need."""
        held = self.lengths + self.q.shape[2] - self.starts
        sinks, _, slots = self.layout.room(max(held.tolist()))
        state = replace(self.state)
        for side in "kv":
            sink, ring = getattr(state, f"sink_{side}"), getattr(state, f"recent_{side}")
            setattr(state, f"sink_{side}", sink[:, :, :sinks].contiguous())
            setattr(state, f"recent_{side}", ring[:, :, : max(slots, least_slots)].contiguous())
        return replace(self, state=state)

    def poisoned(self) -> "Case":
        """The same with NaN and all ones wherever no token lies."""
        layout = self.layout
        changed = self.mapped(Tensor.clone)
        state, q, k, v = changed.state, changed.q, changed.k, changed.v
        for row, (length, start) in enumerate(zip(self.lengths.tolist(), self.starts.tolist(), strict=True)):
            blocks = packed_blocks(length, layout.sinks, layout.recent)
            waiting = [(u - layout.sinks) % layout.recent_slots for u in range(layout.sinks + 32 * blocks, length)]
            unused = [slot for slot in range(self.state.recent_slots) if slot not in waiting]
            for sink, packed, ring, chunk in (
                (state.sink_k, state.packed_k, state.recent_k, k),
                (state.sink_v, state.packed_v, state.recent_v, v),
            ):
                sink[row, :, length:] = torch.nan
                packed[row, :, blocks:] = 0xFF  # none, where they took each other's places
                ring[row, :, unused] = torch.nan
                chunk[row, :, :start] = torch.nan
            q[row, :, :start] = torch.nan
        return changed


def limits(scale: float) -> st.SearchStrategy[Weighting]:
    """Causal attention, with a sliding window, or in chunks."""
    return st.one_of(
        st.just(Weighting(scale)),
        st.builds(Weighting, st.just(scale), sliding_window=st.sampled_from([1, 5, 40, 100])),
        st.builds(Weighting, st.just(scale), attention_chunk=st.sampled_from([1, 5, 40, 100])),
    )


@st.composite
def weightings(draw: st.DrawFn, scale: float, query_heads: int) -> Weighting:
    """All that attention can be."""
    by_head = st.lists(st.floats(-3, 3, width=16), min_size=query_heads, max_size=query_heads).map(torch.tensor)
    return replace(
        draw(limits(scale)),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        sink_logits=draw(st.none() | by_head),
        slopes=draw(st.none() | by_head.map(lambda slopes: slopes / 16)),
    )


@st.composite
def weighted(draw: st.DrawFn, cases: st.SearchStrategy[Case]) -> tuple[Case, Weighting]:
    """Cases with a weighting each; where it sees a window, the state may keep no more."""
    case = draw(cases)
    weighting = draw(weightings(case.q.shape[-1] ** -0.5, case.q.shape[1]))
    return (case.in_window(weighting.window) if weighting.window and draw(st.booleans()) else case), weighting


@st.composite
def cases(draw: st.DrawFn, value_groups: tuple[int, ...] = (8,), values_are_keys: tuple[bool, ...] = (False,)) -> Case:
    precision = st.builds(Precision, BITS, st.sampled_from([8, 16, 32]), st.sampled_from([4, 16]))
    value_dim = draw(st.sampled_from([16, 24, 64]))
    value_group = st.sampled_from([group for group in value_groups if value_dim % group == 0])
    layout = StateLayout(
        SiteShape(draw(st.sampled_from([1, 2])), draw(st.sampled_from([16, 40, 64, 96])), value_dim),
        key=draw(precision),
        value=replace(draw(precision), group=draw(value_group)),
        sinks=draw(st.sampled_from([0, 3, 40])),
        recent=draw(st.sampled_from([32, 45])),
        rollback=draw(st.sampled_from([0, 7])),
    )
    layout = draw(with_important_keys(st.just(layout)))
    full = layout.sinks + layout.recent
    edge = st.sampled_from([0, 1, layout.sinks, full, full + 32, full + 64, full + 128])
    past = st.builds(lambda edge, more: max(0, edge + more), edge, st.integers(-1, 1))
    lengths = draw(st.lists(past, min_size=1, max_size=2))
    tokens = draw(st.sampled_from([1, 1, 1, 2, 9, 33]))
    starts = [draw(st.sampled_from([0, 0, tokens // 2, tokens])) for _ in lengths]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shared, both = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(values_are_keys))
    return Case.random(layout, shared, lengths, starts, tokens, dtype, both)
