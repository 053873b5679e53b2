"""append and attend over pages in plain PyTorch: the specification every other kernel over pages is held to.

What a call reads is gathered into a state of its own, of which reference.py does the rest; what it writes is scattered.
Shapes: those of Chunk (chunk.py) and of Pages (format/pages.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import SiteState, packed_blocks
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.stepwise import Attend, is_one_piece
from kvmix_compile.kernels.weighting import Weighting


@torch.no_grad()
def append(chunk: Chunk, pages: Pages, storage: Storage) -> None:
    """Writes a chunk's keys and values into the pages that there are for them, in place, and packs completed blocks.

    The chunk's lengths are those before it and are left as they are.
    Raises KVMixError, with nothing written, where a token that is to be packed lies in no page.
    """
    place = torch.arange(chunk.key.shape[2], device=chunk.key.device)
    lengths, ends = chunk.lengths, chunk.lengths + len(place) - chunk.starts
    before, after = (packed_blocks(length, pages.sinks, storage.recent) for length in (lengths, ends))
    block = torch.arange(_most(after), device=place.device).expand(len(ends), -1)
    completed = (block >= before[:, None]) & (block < after[:, None])
    blocks = _Places.of_blocks(pages, block, completed).there()
    token = (lengths - chunk.starts)[:, None] + place
    tokens = _Places.of_tokens(pages, token, place >= chunk.starts[:, None]).there()
    state = _waiting(pages, lengths, blocks.wanted, storage)
    reference.append(chunk, state, _seeing_all(storage))
    blocks.write(pages.packed_k, state.packed_k)
    blocks.write(pages.packed_v, state.packed_v)
    tokens.write(pages.raw_k, chunk.key)
    tokens.write(pages.raw_v, chunk.value)


@torch.no_grad()
def attend(query: Tensor, chunk: Chunk, pages: Pages, storage: Storage, weighting: Weighting) -> Tensor:
    """Causal attention of a chunk's queries to the past as pages hold it, and to the chunk itself in full precision.

    Returns [B, Hq, M, value_dim] in the query's dtype, contiguous; zeros for padding.
    Raises KVMixError where what is seen lies in no page.
    """
    state = _held(pages, chunk.lengths, _first_seen(query, chunk, weighting), storage)
    return reference.attend(query, chunk, state, _seeing_all(storage), weighting)


def stepwise(
    attend: Callable[[Tensor, Chunk, Pages, Storage, Weighting], Tensor],
    append: Callable[[Chunk, Pages, Storage], None],
    stepwise_over_state: Attend,
) -> Callable[[Tensor, Chunk, Pages, Storage, Weighting], Tensor]:
    """As stepwise.stepwise, of attend and append over pages: a kernel that attends to each of a chunk's tokens alone,
    and appends the chunk. It needs no more pages than append does.

    stepwise_over_state: a kernel that stepwise.stepwise made. It works on a copy of what the rows hold, since there is
        no page for tokens that wait while a chunk is cut.
    """

    @torch.no_grad()
    def kernel(query: Tensor, chunk: Chunk, pages: Pages, storage: Storage, weighting: Weighting) -> Tensor:
        if is_one_piece(query, storage):
            attended = attend(query, chunk, pages, storage, weighting)
        else:
            ends = chunk.lengths + query.shape[2] - chunk.starts
            state = _held(pages, chunk.lengths, _first_seen(query, chunk, weighting), storage, ends)
            attended = stepwise_over_state(query, chunk, state, _seeing_all(storage), weighting)
        append(chunk, pages, storage)
        return attended

    return kernel


def _first_seen(query: Tensor, chunk: Chunk, weighting: Weighting) -> Tensor:
    """The first token of each row that one of its queries sees: int64 [B]. A row of padding alone sees nothing."""
    return torch.where(chunk.starts < query.shape[2], weighting.first_visible(chunk.lengths), chunk.lengths)


@dataclass(frozen=True)
class _Places:
    """Where tokens or blocks of rows lie in a pool, int64 [B, n] each, and bool, which of them are wanted.

    number: of each in its row. page: negative where there is none. pages: of the pool.
    """

    kind: str
    number: Tensor
    page: Tensor
    place: Tensor
    wanted: Tensor
    pages: int

    @classmethod
    def of_tokens(cls, pages: Pages, token: Tensor, wanted: Tensor) -> _Places:
        """In raw pages."""
        return cls._of("token", pages.raw, pages.raw_k, token, wanted)

    @classmethod
    def of_blocks(cls, pages: Pages, block: Tensor, wanted: Tensor) -> _Places:
        """In packed pages."""
        return cls._of("block", pages.packed, pages.packed_k, block, wanted)

    @classmethod
    def _of(cls, kind: str, table: Tensor, pool: Tensor, number: Tensor, wanted: Tensor) -> _Places:
        pages, size = pool.shape[0], pool.shape[2]
        # Where the table ends there is no page.
        index = (number // size).clamp(0, table.shape[1])
        page = torch.nn.functional.pad(table, (0, 1), value=-1).gather(1, index)
        found = cls(kind, number, page.long(), number % size, wanted, pages)
        found._check(page >= pages)
        return found

    def there(self) -> _Places:
        """The same, of which those are wanted alone that have a page."""
        return replace(self, wanted=self.wanted & (self.page >= 0))

    def read(self, pool: Tensor) -> Tensor:
        """What is wanted, [B, H, n, extent], and zeros elsewhere.

        Raises KVMixError where it has no page.
        """
        self._check(self.page < 0)
        read = pool.new_zeros(*self.page.shape, pool.shape[1], pool.shape[3])
        read[self.wanted] = pool[self.page[self.wanted], :, self.place[self.wanted]]
        return read.transpose(1, 2).contiguous()

    def write(self, pool: Tensor, content: Tensor) -> None:
        """content: [B, H, n, extent]."""
        pool[self.page[self.wanted], :, self.place[self.wanted]] = content.transpose(1, 2)[self.wanted]

    def _check(self, is_wrong: Tensor) -> None:
        wrong = (is_wrong & self.wanted).nonzero()
        if len(wrong):
            row, index = wrong[0].tolist()
            raise KVMixError(
                f"the block table has {self.kind} {int(self.number[row, index])} of row {row} in page "
                f"{int(self.page[row, index])} of {self.pages}: give it one of these pages"
            )


@lru_cache(maxsize=1024)
def _seeing_all(storage: Storage) -> Storage:
    """The same for states that have room for all blocks."""
    return replace(storage, window=0)


def _most(counts: Tensor) -> int:
    return max(counts.tolist(), default=0)


def _waiting(pages: Pages, lengths: Tensor, is_packed: Tensor, storage: Storage) -> SiteState:
    """A state in which chunks of rows of so many tokens can be packed.

    is_packed: bool [B, blocks], the blocks whose tokens it has, of all those that it has room for.
    """
    rows, room, sinks = *is_packed.shape, pages.sinks
    first = sinks + BLOCK_TOKENS * packed_blocks(lengths, sinks, storage.recent)
    token = _ring(first, lengths, sinks)
    block = ((token - sinks) // BLOCK_TOKENS).clamp(0, room)
    wanted = torch.nn.functional.pad(is_packed, (0, 1)).gather(1, block) & (token < lengths[:, None])
    waiting = _Places.of_tokens(pages, token, wanted)

    def empty(pool: Tensor, count: int) -> Tensor:
        return pool.new_zeros(rows, pool.shape[1], count, pool.shape[3])

    return SiteState(
        sink_k=empty(pages.raw_k, sinks),
        sink_v=empty(pages.raw_v, sinks),
        packed_k=empty(pages.packed_k, room),
        packed_v=empty(pages.packed_v, room),
        recent_k=waiting.read(pages.raw_k),
        recent_v=waiting.read(pages.raw_v),
    )


def _held(pages: Pages, lengths: Tensor, first: Tensor, storage: Storage, ends: Tensor | None = None) -> SiteState:
    """What rows of so many tokens hold from token `first` on, with every block in its own place: int64 [B] each.

    ends: how many tokens there is room for; as many as there are, unless said otherwise.
    """
    rows, sinks = len(lengths), pages.sinks
    count = packed_blocks(lengths, sinks, storage.recent)
    token = torch.arange(sinks, device=lengths.device).expand(rows, -1)
    in_sink = _Places.of_tokens(pages, token, (token >= first[:, None]) & (token < lengths[:, None]))
    token = _ring((sinks + BLOCK_TOKENS * count).maximum(first), lengths, sinks, 1 if ends is None else storage.recent)
    recent = _Places.of_tokens(pages, token, token < lengths[:, None])
    room = _most(count if ends is None else packed_blocks(ends, sinks, storage.recent))
    block = torch.arange(room, device=lengths.device).expand(rows, -1)
    first_block = (first - sinks).clamp(min=0) // BLOCK_TOKENS
    blocks = _Places.of_blocks(pages, block, (block >= first_block[:, None]) & (block < count[:, None]))
    return SiteState(
        sink_k=in_sink.read(pages.raw_k),
        sink_v=in_sink.read(pages.raw_v),
        packed_k=blocks.read(pages.packed_k),
        packed_v=blocks.read(pages.packed_v),
        recent_k=recent.read(pages.raw_k),
        recent_v=recent.read(pages.raw_v),
    )


def _ring(first: Tensor, end: Tensor, sinks: int, least: int = 1) -> Tensor:
    """The token in each slot of a ring that holds tokens first to end - 1 of rows: int64 [B, slots], as many slots as
    it takes and `least` at least; where a slot holds none, one from `end` on.
    """
    slot = torch.arange(max(least, _most(end - first)), device=first.device)
    return first[:, None] + (slot - (first - sinks)[:, None]) % len(slot)
