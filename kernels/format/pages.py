"""What one attention site keeps of its past where somebody else owns the memory: pages of pools, handed out to rows.

An engine that serves many texts cuts its memory into pages and notes for each row which of them hold its tokens
(vLLM's block tables). A row's packed blocks lie in pages of one kind, its unquantized tokens in pages of another. Of a
row that holds n tokens, token u lies
- at place ``u % T`` of page ``raw[row, u // T]`` for u < sinks, and for sinks + 32 * packed_blocks(n) <= u < n;
- in packed block ``b = (u - sinks) // 32`` else, at place ``b % P`` of page ``packed[row, b // P]``.
There is no ring, and no block takes the place of another: what is kept, and for how long, is for the engine to say.

append packs blocks from raw pages and from its chunk, whichever holds their tokens, and so a long chunk needs few raw
pages. It writes the chunk's tokens and the completed blocks into those pages of theirs that there are. There is none
where an entry of the table is negative, or the table ends before it: what belongs there is left out, and nothing else
is written. So a row needs
- raw pages of its sinks and of its last `recent` tokens, and
- packed pages of its packed blocks,
as far as a later token sees them, or, of recent tokens, as far as they will be packed into a block that one sees. The
engine may free all others and hand them out again; their entries are never read, whatever they are.

Rows may share pages that hold what they have in common. Where several rows complete the same block of a shared page in
the same call, they write the same bytes. Which tokens a packed block holds depends on the sinks: an engine whose pages
are known by the tokens in them hands over its table from the page of the first token behind the sinks.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


# Made of each site's tensors at every call: a frozen dataclass takes twice as long to make.
class Pages(NamedTuple):
    """One site's pages, for B rows and H heads of keys and values; T tokens or P packed blocks to a page.

    raw: int32 [B, raw pages of the longest row], the page of the pool that holds each T tokens of a row.
    packed: int32 [B, packed pages of the longest row], the one that holds each P blocks.
    raw_k [pages, H, T, key_dim], raw_v [pages, H, T, value_dim]: the model's dtype.
    packed_k, packed_v: uint8 [pages, H, P, bytes of a block].
    sinks: first tokens of a row that are never quantized.
    Of all six, the last dimension is contiguous; other strides are any, so that a pool may be part of a larger buffer.
    """

    raw: Tensor
    packed: Tensor
    raw_k: Tensor
    raw_v: Tensor
    packed_k: Tensor
    packed_v: Tensor
    sinks: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All but the sinks, in the order the operators take them."""
        return self[:6]

    @property
    def raw_tokens(self) -> int:
        """Tokens of a raw page."""
        return self.raw_k.shape[2]

    @property
    def packed_blocks(self) -> int:
        """Blocks of a packed page."""
        return self.packed_k.shape[2]
