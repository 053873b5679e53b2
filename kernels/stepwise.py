"""Stepwise: attend and append as if the tokens of a chunk had come one by one.

attend shows the tokens of a chunk each other in full precision, and only what was there before as it is stored: what a
token reads depends on where a text was cut into chunks. Here each token reads what lies behind its recent window as it
is stored, its own chunk's tokens too.

What is packed changes where a row's length passes sinks + recent, and at every 32nd token from there. Between two
such lengths all tokens read the same blocks: so a chunk is attended to and appended in pieces that end there, by the
kernels that there are, and no piece is longer than a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import ENDLESS, SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.mixed_dtypes import Attend
from kvmix_compile.kernels.weighting import Weighting

Append = Callable[[Chunk, SiteState, Storage], None]


def stepwise(attend: Attend, append: Append) -> Attend:
    """A kernel that attends as `attend` would to each of a chunk's tokens alone, and appends the chunk, from these two.

    Whatever the device, the host waits for nothing that they do not wait for.
    """

    def kernel(query: Tensor, chunk: Chunk, state: SiteState, storage: Storage, weighting: Weighting) -> Tensor:
        # A token that comes alone is read by all that follow from the state, in whose dtype it is.
        chunk = chunk.in_dtype(state.dtype)
        if is_one_piece(query, storage):
            attended = attend(query, chunk, state, storage, weighting)
            append(chunk, state, storage)
            return attended
        cut = _Cut.of(chunk, state.sinks + storage.recent)
        pieces = []
        for number in range(cut.pieces):
            piece = cut.piece(number, chunk)
            pieces.append(attend(cut.taken(number, query), piece, state, storage, weighting))
            append(piece, state, storage)
        return cut.joined(pieces)

    return kernel


def is_one_piece(query: Tensor, storage: Storage) -> bool:
    """Whether a chunk is attended to as by attend: it is of one token, or what is stored is what was."""
    is_read_otherwise = storage.recent != ENDLESS and (storage.key.is_quantized or storage.value.is_quantized)
    return query.shape[2] == 1 or not is_read_otherwise


Length = TypeVar("Length", int, Tensor)


def slots_before(length: Length, unpacked: int) -> Length:
    """The slots of a chunk's first piece that come before its tokens, in a row that holds `length`: all tokens of a
    piece of BLOCK_TOKENS slots find the same blocks packed.

    unpacked: the most tokens that a row holds before any is packed.
    """
    # Blocks are packed with the token that finds one more than `unpacked` and whole blocks before it.
    return (length - unpacked - 1) % BLOCK_TOKENS


@dataclass(frozen=True)
class _Cut:
    """Where the rows of a chunk are cut. Token t of a row, its padding not counted, is slot ``t + before`` of the
    pieces, of which each has BLOCK_TOKENS slots.

    starts, lengths, tokens, before: int64 [B, 1]: a row's padding, what it holds, its tokens in the chunk, and the
        slots of its first piece that come before them.
    longest: the chunk's tokens, padding counted.
    """

    starts: Tensor
    lengths: Tensor
    tokens: Tensor
    before: Tensor
    longest: int

    @classmethod
    def of(cls, chunk: Chunk, unpacked: int) -> _Cut:
        """unpacked: the most tokens that a row holds before any is packed."""
        starts, lengths, longest = chunk.starts[:, None], chunk.lengths[:, None], chunk.key.shape[2]
        return cls(starts, lengths, tokens=longest - starts, before=slots_before(lengths, unpacked), longest=longest)

    @property
    def pieces(self) -> int:
        """As many as any row may need; the last ones of some are all padding."""
        return (self.longest + 2 * BLOCK_TOKENS - 2) // BLOCK_TOKENS

    def piece(self, number: int, chunk: Chunk) -> Chunk:
        """One of them, as a chunk of its own."""
        first, end = self._tokens_of(number)
        return Chunk(
            key=self.taken(number, chunk.key),
            value=self.taken(number, chunk.value),
            lengths=(self.lengths + first).flatten(),
            starts=(BLOCK_TOKENS - (end - first)).flatten(),
        )

    def taken(self, number: int, tokens: Tensor) -> Tensor:
        """What a piece has of `tokens` [B, heads, M, dim]: [B, heads, BLOCK_TOKENS, dim], its padding first."""
        _, end = self._tokens_of(number)
        slot = torch.arange(BLOCK_TOKENS, device=tokens.device)
        # Padding is read by nobody: any token will do.
        return _along(tokens, (self.starts + end - BLOCK_TOKENS + slot).clamp(0, tokens.shape[2] - 1))

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """What the pieces gave, in the chunk's order and contiguous; zeros for padding."""
        token = torch.arange(self.longest, device=self.starts.device) - self.starts
        number = (token + self.before).div(BLOCK_TOKENS, rounding_mode="floor")
        _, end = self._tokens_of(number)
        place = (number + 1) * BLOCK_TOKENS - (end - token)
        joined = _along(torch.cat(pieces, dim=2), place.clamp(min=0))
        return joined.masked_fill_((token < 0)[:, None, :, None], 0)

    def _tokens_of(self, number: int | Tensor) -> tuple[Tensor, Tensor]:
        """The first of a piece's tokens in each row, and the one behind its last: equal where it has none."""
        first = (number * BLOCK_TOKENS - self.before).clamp(min=0).minimum(self.tokens)
        end = ((number + 1) * BLOCK_TOKENS - self.before).minimum(self.tokens)
        return first, end


def _along(tokens: Tensor, index: Tensor) -> Tensor:
    """Of each row of `tokens` [B, heads, tokens, dim] those that `index` [B, n] says."""
    return tokens.gather(2, index[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3]))
