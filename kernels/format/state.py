"""What one attention site keeps of its past, and which token lies where.

    [ sink: first tokens | packed blocks of 32 tokens | recent window ]

Of a row that holds n tokens, token u lies in
- ``sink[u]`` for u < sinks;
- block ``b = (u - sinks) // 32`` for sinks <= u < sinks + 32 * packed_blocks(n), which is in place ``b % C`` of C. That
  is its own place, except where attention sees a sliding window, or chunks: there, later blocks take the places of
  those that nothing sees any more;
- slot ``(u - sinks) % slots`` of the recent window, a ring, from there to n. These are recent - 31 to recent tokens
  once any is packed.
The ring holds the last min(n - sinks, slots) tokens, packed or not; what was never written is zero. So the bytes are a
function of the tokens alone, not of the chunks they came in.

A state grows with its text: the sinks, then the ring, then the packed blocks. Kernels take its sizes from its tensors,
and are right about one that is not whole yet: while no token is beyond the sinks that there are, none is looked for in
the ring, which may have no slot then; until the ring has wrapped, tokens lie in it where they will in a longer one; and
nothing is packed before there are all sinks and `recent` slots. So growing appends zeros and moves nothing, and how far
a state has grown is a function of the tokens, too. Where code is compiled for its sizes, Triton's kernels among it, a
state has all sinks and the whole ring from the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from kvmix_compile.kernels.ambient import ordinary_tensors
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Axis, Precision
from kvmix_compile.kernels.format.shape import Shaped, SiteShape
from kvmix_compile.kernels.format.storage import Storage

Length = TypeVar("Length", int, Tensor)

# As recent tokens, more than a row will ever have: where attention sees no more than the recent window, nothing is ever
# packed. A number and not None, since kernels on every device work out a row's packed blocks from it, and get none.
ENDLESS = 2**30

# Packed blocks grow in steps of at least an eighth, unquantized tokens, which are many times as large, in steps of a
# sixteenth: growing copies, and so costs each token a constant number of copies.
BLOCK_GROWTH_SHIFT = 3
TOKEN_GROWTH_SHIFT = 4


def is_packed(window: int, recent: int) -> bool:
    """Whether anything is ever packed where a token sees `window` tokens (0: all): not if these are recent ones all."""
    return not 0 < window <= recent + 1


def unpacked_tokens(window: int, sinks: int, recent: int) -> tuple[int, int]:
    """The sinks and the recent tokens of a site that sees `window` tokens, where those of the model are `sinks` and
    `recent`: where nothing is packed its window is kept and nothing else.
    """
    return (sinks, recent) if is_packed(window, recent) else (0, ENDLESS)


def held_blocks(window: int, context: int) -> int:
    """Blocks of 32 tokens, packed or not, that a site which sees `window` tokens (0: all) holds of a text of `context`
    tokens; 1 where the context is 0: not told, so that all sites count alike.
    """
    tokens = min(window, context) if window else context
    return max(1, -(-tokens // BLOCK_TOKENS)) if context else 1


def packed_blocks(length: Length, sinks: int, recent: int) -> Length:
    """Blocks packed of a row that holds this many tokens: as many as leave at most `recent` of them unpacked.

    length: a number, or an int64 tensor of any shape.
    """
    # max and clamp in one spelling for numbers and tensors: a comparison times the rounded-up quotient.
    beyond = length - sinks - recent
    return (beyond + BLOCK_TOKENS - 1) // BLOCK_TOKENS * (beyond > 0)


def required_blocks(length: int, sinks: int, recent: int, window: int = 0, rollback: int = 0) -> int:
    """Blocks a state must have room for before a row can hold this many tokens. window, rollback: as of StateLayout."""
    packed = packed_blocks(length, sinks, recent)
    return min(packed, visible_blocks(window, recent, rollback)) if window else packed


def visible_blocks(window: int, recent: int, rollback: int = 0) -> int:
    """The most blocks of a row that hold a token which one of the next sees, be it `rollback` tokens earlier."""
    # Packed blocks end where the recent window begins, which holds recent - 31 tokens at least.
    tokens = window - 1 + rollback - (recent - BLOCK_TOKENS + 1)
    return max(0, tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


def _ahead(count: int, shift: int) -> int:
    """A number of which a state has room for, rounded up to `shift` significant binary digits and one more: a function
    of the number alone, so that the size of a cache can be predicted, and at most one part in 2**shift above it.
    """
    step = 1 << max(0, count.bit_length() - 1 - shift)
    return -(-count // step) * step


# Made of each state at every call: a frozen dataclass takes twice as long to make.
class Room(NamedTuple):
    """What there is room for in each row of a state: first tokens, packed blocks, and tokens of the recent window."""

    sinks: int
    blocks: int
    slots: int

    def covers(self, other: Room) -> bool:
        """Whether whatever has room there has room here."""
        return self.sinks >= other.sinks and self.blocks >= other.blocks and self.slots >= other.slots


@dataclass(frozen=True)
class StateLayout(Shaped):
    """How one site's state is laid out.

    shape: what the site caches of a token, and the window that a token attends to.
    key, value: how its packed blocks are stored.
    sinks: first tokens of a row that are never quantized (attention sinks, arXiv:2309.17453).
    recent: the most tokens that wait in the recent window to be packed, at least 32; ENDLESS, where there is a sliding
        window: none is ever packed.
    rollback: the most tokens by which a row may be shortened again.
    """

    shape: SiteShape
    key: Precision
    value: Precision
    sinks: int
    recent: int
    rollback: int = 0

    def __post_init__(self) -> None:
        self.key.check(self.key_dim, Axis.TOKENS)
        self.value.check(self.value_dim, Axis.CHANNELS)
        if self.recent < BLOCK_TOKENS:
            raise KVMixError(f"at least {BLOCK_TOKENS} recent tokens must stay unpacked, not {self.recent}")
        if self.recent == ENDLESS and not self.window:
            raise KVMixError("only a state of a window can keep all of it unpacked")
        if min(self.sinks, self.rollback, self.window) < 0:
            raise KVMixError(
                f"sinks ({self.sinks}), rollback ({self.rollback}) and window ({self.window}) cannot be negative"
            )

    @cached_property
    def storage(self) -> Storage:
        """What kernels are told of it, beside the state's tensors."""
        return Storage(key=self.key, value=self.value, recent=self.recent, window=self.window)

    @property
    def recent_slots(self) -> int:
        """Tokens the recent window has room for where it is whole."""
        # A window of one token sees none before it; a ring has a slot nevertheless.
        kept = max(1, self.window - 1) if self.recent == ENDLESS else self.recent
        return kept + self.rollback

    def required_blocks(self, length: int) -> int:
        """Blocks a state must have room for before a row can hold this many tokens."""
        return required_blocks(length, self.sinks, self.recent, self.window, self.rollback)

    def capacity_blocks(self, length: int) -> int:
        """Blocks that a state has room for once its rows hold up to this many tokens."""
        capacity = _ahead(packed_blocks(length, self.sinks, self.recent), BLOCK_GROWTH_SHIFT)
        return min(capacity, visible_blocks(self.window, self.recent, self.rollback)) if self.window else capacity

    def room(self, length: int, begins_whole: bool = False) -> Room:
        """What a state has room for once its rows hold up to this many tokens: more than `required_room`, so that it
        seldom grows.

        begins_whole: all sinks and the whole recent window from the beginning.
        """
        blocks = self.capacity_blocks(length)
        return self.whole(blocks) if begins_whole else self._reaching(_ahead(length, TOKEN_GROWTH_SHIFT), blocks)

    def required_room(self, length: int) -> Room:
        """The room that a state must have before a row can hold this many tokens."""
        return self._reaching(length, self.required_blocks(length))

    def whole(self, blocks: int) -> Room:
        """All the sinks and the whole recent window, beside so many blocks."""
        return Room(self.sinks, blocks, self.recent_slots)

    def _reaching(self, tokens: int, blocks: int) -> Room:
        """Sinks and a recent window for the first `tokens` of a row, as far as they go."""
        sinks = min(self.sinks, tokens)
        return Room(sinks, blocks, min(self.recent_slots, tokens - sinks))

    def can_shorten(self, furthest: int, length: int) -> bool:
        """Whether a row that has held `furthest` tokens still has all that one of its first `length` needs."""
        blocks = packed_blocks(length, self.sinks, self.recent)
        first_seen = max(0, length - self.window + 1) if self.window else 0
        # What waits to be packed is needed whether it is seen or not: its whole group shares a scale.
        first_needed = first_seen if self.recent == ENDLESS else self.sinks + BLOCK_TOKENS * blocks
        # Later tokens took the slots of earlier ones, and later blocks of a sliding window the places of earlier ones.
        if first_needed < min(length, furthest - self.recent_slots):
            return False
        if not self.window:
            return True
        capacity = visible_blocks(self.window, self.recent, self.rollback)
        lost = packed_blocks(furthest, self.sinks, self.recent) - capacity
        return min(blocks, lost) <= max(0, first_seen - self.sinks) // BLOCK_TOKENS

    def unquantized_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype tokens that are not packed are kept, of a model that computes in this one: instead of float32
        in float16, where keys and values are quantized once they are packed, which rounds them much more.
        """
        is_quantized = self.storage.is_quantized and self.recent != ENDLESS
        return torch.float16 if dtype == torch.float32 and is_quantized else dtype

    def bytes(self, batch: int, room: Room, dtype: torch.dtype) -> int:
        """What a state of this many rows, this room and this dtype occupies."""
        unpacked = (room.sinks + room.slots) * (self.key_dim + self.value_dim) * dtype.itemsize
        return batch * self.kv_heads * (unpacked + room.blocks * self.packed_bytes(dtype))

    def packed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a packed block of one head, keys and values."""
        key, value = (
            self.key.block_bytes(self.key_dim, dtype.itemsize),
            self.value.block_bytes(self.value_dim, dtype.itemsize),
        )
        return key + value


@dataclass
class SiteState:
    """One site's tensors, for B rows, H heads of keys and values, and room for C packed blocks; of sinks and slots as
    many as there is room for.

    sink_k [B, H, sinks, key_dim], sink_v [B, H, sinks, value_dim]: the state's dtype (StateLayout.unquantized_dtype).
    packed_k, packed_v: uint8 [B, H, C, bytes of a block].
    recent_k [B, H, slots, key_dim], recent_v [B, H, slots, value_dim]: the state's dtype.
    None is made in inference mode, whatever mode is on: they are written to in any.
    """

    sink_k: Tensor
    sink_v: Tensor
    packed_k: Tensor
    packed_v: Tensor
    recent_k: Tensor
    recent_v: Tensor

    @classmethod
    def allocate(
        cls, layout: StateLayout, batch: int, blocks: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """An empty state, all zeros, with all its sinks and its whole recent window."""
        return cls.with_room(layout, batch, layout.whole(blocks), dtype, device)

    @classmethod
    @ordinary_tensors()
    def with_room(
        cls, layout: StateLayout, batch: int, room: Room, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """An empty state, all zeros, of this room."""

        def zeros(count: int, extent: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, layout.kv_heads, count, extent, dtype=dtype, device=device)

        return cls(
            sink_k=zeros(room.sinks, layout.key_dim),
            sink_v=zeros(room.sinks, layout.value_dim),
            packed_k=zeros(room.blocks, layout.key.block_bytes(layout.key_dim, dtype.itemsize), torch.uint8),
            packed_v=zeros(room.blocks, layout.value.block_bytes(layout.value_dim, dtype.itemsize), torch.uint8),
            recent_k=zeros(room.slots, layout.key_dim),
            recent_v=zeros(room.slots, layout.value_dim),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order the operators take them."""
        return self.sink_k, self.sink_v, self.packed_k, self.packed_v, self.recent_k, self.recent_v

    @property
    def dtype(self) -> torch.dtype:
        """That of the tokens which are not packed."""
        return self.sink_k.dtype

    @property
    def batch(self) -> int:
        """Rows."""
        return self.packed_k.shape[0]

    @property
    def sinks(self) -> int:
        """First tokens of a row that there is room for, and that are never quantized."""
        return self.sink_k.shape[2]

    @property
    def blocks(self) -> int:
        """Packed blocks there is room for in each row."""
        return self.packed_k.shape[2]

    @property
    def recent_slots(self) -> int:
        """Tokens the recent window has room for."""
        return self.recent_k.shape[2]

    @property
    def room(self) -> Room:
        """What there is room for in each row."""
        return Room(self.sinks, self.blocks, self.recent_slots)

    @property
    def nbytes(self) -> int:
        """What the tensors occupy."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @ordinary_tensors()
    def grow(self, room: Room) -> None:
        """Makes at least this room in all; what is stored stays, new room is zero.

        Only where every token and block lies in its own place: there never were more than there is room for.
        """
        self.sink_k, self.sink_v = _lengthened(self.sink_k, room.sinks), _lengthened(self.sink_v, room.sinks)
        self.packed_k, self.packed_v = _lengthened(self.packed_k, room.blocks), _lengthened(self.packed_v, room.blocks)
        self.recent_k, self.recent_v = _lengthened(self.recent_k, room.slots), _lengthened(self.recent_v, room.slots)

    @ordinary_tensors()
    def widen(self, old: StateLayout, new: StateLayout, lengths: Tensor, furthest: Tensor, room: Room) -> None:
        """Lay out as `new` what lies here as in `old`, from which it differs in a longer rollback.

        lengths, furthest: int64 [rows], the tokens that each row holds, and the most that it ever held: later ones took
            the places of earlier ones.
        room: that of `new` for as many tokens as the longest row holds. Where `new` has no window, blocks stay as they
            are.
        """
        # A ring that is not whole has never wrapped, and nothing of it is lost.
        first, end = furthest - old.sinks - old.recent_slots, (lengths - old.sinks).clamp(min=0)
        slots = max(room.slots, self.recent_slots)
        self.recent_k = _in_ring(self.recent_k, first, end, slots)
        self.recent_v = _in_ring(self.recent_v, first, end, slots)
        if new.window:
            end = packed_blocks(lengths, old.sinks, old.recent)
            # None is lost before there is room for as many as are seen.
            capacity = visible_blocks(old.window, old.recent, old.rollback)
            first = packed_blocks(furthest, old.sinks, old.recent) - capacity
            blocks = max(room.blocks, self.blocks)
            self.packed_k = _in_ring(self.packed_k, first, end, blocks)
            self.packed_v = _in_ring(self.packed_v, first, end, blocks)

    @ordinary_tensors()
    def select_rows(self, index: Tensor) -> None:
        """Replaces the rows by those at these places: reorders, repeats or drops them.

        index: int64 [new number of rows].
        """
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.index_select(0, index))

    @ordinary_tensors()
    def make_ordinary(self) -> None:
        """Replaces what inference mode made, which nothing outside it may write to, by copies."""
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.clone() if tensor.is_inference() else tensor)


def _lengthened(kept: Tensor, places: int) -> Tensor:
    """With zeros behind what is kept, up to so many places: [B, H, at least places, extent]."""
    missing = places - kept.shape[2]
    return torch.nn.functional.pad(kept, (0, 0, 0, missing)) if missing > 0 else kept


def _in_ring(ring: Tensor, first: Tensor, end: Tensor, places: int) -> Tensor:
    """A ring of so many places that holds what `ring` does: entry i in place i modulo the number of places, and zeros
    where there is none.

    ring [B, H, old places, extent]; first, end: int64 [B], each row's entries that are held, from one up to the other.
    """
    place = torch.arange(places, device=ring.device)
    entry = (end - 1)[:, None] - ((end - 1)[:, None] - place) % places
    held = entry >= first.clamp(min=0)[:, None]
    row = torch.arange(len(end), device=ring.device)[:, None]
    moved = ring.transpose(1, 2)[row, entry % ring.shape[2]] if ring.shape[2] else ring.new_zeros(1, 1, 1, 1)
    kept = torch.where(held[:, :, None, None], moved, torch.zeros((), dtype=ring.dtype, device=ring.device))
    return kept.expand(-1, -1, ring.shape[1], ring.shape[3]).transpose(1, 2).contiguous()
