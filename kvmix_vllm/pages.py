"""Pages: how many unquantized tokens, and how many packed blocks, lie in one of vLLM's blocks.

vLLM has one pool of blocks of equal bytes, and hands each to whichever group of layers asks for one. A block serves all
layers of a group. Here a group is either of packed blocks or of unquantized tokens, of which far fewer fill a block:

    a block of unquantized tokens     [ layer 0: 32 tokens of each head | layer 1 | .. ]
    a block of packed blocks          [ layer 0: 6 blocks of 32 tokens of each head | layer 1 | .. ]

Each group has a block table of its own (kernels.format.pages). All count a row's tokens from its first one. A packed
block is written when sinks and recent tokens are behind it, `skipped` blocks of tokens later than where its tokens lie;
and there is its place in the table. So once a row has filled a page of the table with tokens, all of that page is
written, and nothing behind it: whatever begins with the same tokens can share it. The blocks of a page divide
`skipped`, so that a row's first block begins one of them.

Layers that see a window have packed blocks in a group of their own, a group for each window, with as many blocks in a
page as suit their number: of these pages a row holds the last ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import lcm

import torch

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import ENDLESS, StateLayout, packed_blocks

# Tokens of an unquantized page. vLLM's prefix cache hashes so many at a time, so not fewer.
RAW_TOKENS = (8, 16, 32, 64)

# The text that pages are to fit: it is cut into few of them, and most are filled.
TYPICAL_TOKENS = 4096

# In bytes: pages begin where elements of any dtype may.
ALIGNMENT = 64


@dataclass(frozen=True)
class Kept:
    """Which of a row's places a table has pages for, a place being that of a token: its first `sinks`, and from
    `first_recent` on.

    page: places of a page. recent: as in StateLayout, of unquantized tokens beside packed blocks. window: where the
    last places alone are kept, so many, with that of the next token; else 0.
    """

    page: int
    sinks: int
    recent: int
    window: int = 0

    @classmethod
    def of(cls, layout: StateLayout, page: int) -> Kept:
        """The tokens that a site keeps unquantized in pages of so many."""
        if is_packed(layout):
            return cls(page, layout.sinks, layout.recent)
        return cls(page, sinks=0, recent=0, window=layout.window)

    def first_recent(self, length: int) -> int:
        """The first place behind the sinks that the next token needs, in a row of so many."""
        if self.window:
            return max(0, length - self.window + 1)
        return self.sinks + BLOCK_TOKENS * packed_blocks(length, self.sinks, self.recent)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens fill, the last of them perhaps in part."""
        return -(-tokens // self.page)

    def sink_pages(self, length: int) -> range:
        """Pages with sinks of a row of so many tokens."""
        return range(self.pages(min(self.sinks, length)))

    def recent_pages(self, length: int) -> range:
        """Pages with the recent tokens of a row of so many."""
        return range(self.first_recent(length) // self.page, self.pages(length))

    def is_kept(self, page: int, length: int) -> bool:
        """Whether a row of so many tokens needs this page of them."""
        return page in self.sink_pages(length) or page in self.recent_pages(length)

    def most_pages(self, length: int) -> int:
        """Pages that a row takes which grows a token at a time up to so many."""
        recent = self.window - 1 if self.window else self.recent
        # One more than what is kept: for the token that is written.
        return min(self.pages(length), self.pages(self.sinks) + self.pages(recent) + 1)

    def most_pages_of_chunk(self, length: int) -> int:
        """Pages that a row may take which grows by chunks up to so many tokens: with what was recent before one."""
        return min(self.pages(length), 2 * self.most_pages(length))


@dataclass(frozen=True)
class PackedPage:
    """A page of packed blocks of one layer.

    block_bytes: of the keys and the values of one head's block. blocks: of a page. padding: bytes that no block takes.
    """

    heads: int
    block_bytes: int
    blocks: int
    padding: int = 0

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK_TOKENS

    @property
    def nbytes(self) -> int:
        return self.heads * self.blocks * self.block_bytes + self.padding

    def kept(self, layout: StateLayout) -> Kept | None:
        """Which of a row's packed blocks there are pages for, each at its place; None: all."""
        if not layout.window:
            return None
        # What the next token sees may begin with the last token of a block.
        seen = layout.sinks + layout.window + BLOCK_TOKENS - 1
        return Kept(self.tokens, sinks=0, recent=0, window=seen - BLOCK_TOKENS * skipped_blocks(layout))


@dataclass(frozen=True)
class Paging:
    """How a model's layers are laid into vLLM's blocks.

    raw_tokens: unquantized tokens of a page. packed: the page of each layer of which anything is packed.
    """

    raw_tokens: int
    packed: Mapping[str, PackedPage]

    @property
    def shared_tokens(self) -> int:
        """Rows that begin alike share pages up to a multiple of so many tokens."""
        return lcm(self.raw_tokens, *(page.tokens for page in self.packed.values()))


def is_packed(layout: StateLayout) -> bool:
    """Whether anything of a site is ever packed."""
    return layout.recent != ENDLESS


def skipped_blocks(layout: StateLayout) -> int:
    """Places of a row's packed pages in front of its first block."""
    return (layout.sinks + layout.recent) // BLOCK_TOKENS


def raw_bytes(layout: StateLayout, dtype: torch.dtype) -> int:
    """Bytes of one head's keys and values of a token that is not quantized, of a model in this dtype."""
    return (layout.key_dim + layout.value_dim) * layout.unquantized_dtype(dtype).itemsize


def paging(layouts: Mapping[str, StateLayout], dtype: torch.dtype) -> Paging:
    """The pages of layers, by their names, in which a text of TYPICAL_TOKENS takes the fewest bytes."""
    packed = {name: layout for name, layout in layouts.items() if is_packed(layout)}
    if not packed:
        return Paging(BLOCK_TOKENS, {})
    skipped = skipped_blocks(next(iter(packed.values())))
    fitting = [blocks for blocks in range(1, skipped + 1) if skipped % blocks == 0]
    windows = list(dict.fromkeys(layout.window for layout in packed.values()))
    choices = [
        (raw_tokens, _with_packed_pages(packed, dtype, dict(zip(windows, blocks, strict=True))))
        for raw_tokens in RAW_TOKENS
        for blocks in product(fitting, repeat=len(windows))
    ]
    raw_tokens, groups = min(choices, key=lambda choice: _typical_bytes(packed, dtype, *choice))
    pages = {name: page for group in groups for name, page in _in_one_group(group).items()}
    return Paging(raw_tokens, pages)


def _with_packed_pages(
    layouts: Mapping[str, StateLayout], dtype: torch.dtype, blocks: Mapping[int, int]
) -> list[dict[str, PackedPage]]:
    """Pages of layers, by their names, in groups: of each window, with so many blocks in a page."""
    return [
        {
            name: PackedPage(layout.kv_heads, layout.packed_bytes(dtype), of_each)
            for name, layout in layouts.items()
            if layout.window == window
        }
        for window, of_each in blocks.items()
    ]


def _typical_bytes(
    layouts: Mapping[str, StateLayout], dtype: torch.dtype, raw_tokens: int, groups: list[dict[str, PackedPage]]
) -> int:
    """What a text of TYPICAL_TOKENS takes in pages of so many unquantized tokens and in those of packed blocks."""
    sizes = [sum(layout.kv_heads * raw_tokens * raw_bytes(layout, dtype) for layout in layouts.values())]
    pages = Kept.of(next(iter(layouts.values())), raw_tokens).most_pages(TYPICAL_TOKENS)
    for group in groups:
        sizes.append(sum(page.nbytes for page in group.values()))
        name, page = next(iter(group.items()))
        kept = page.kept(layouts[name])
        pages += -(-TYPICAL_TOKENS // page.tokens) if kept is None else kept.most_pages(TYPICAL_TOKENS)
    return max(sizes) * pages


def _in_one_group(pages: dict[str, PackedPage]) -> dict[str, PackedPage]:
    """The same, one of them padded where there are as many of each size: vLLM takes that for a pattern of layers which
    repeats itself, and would split them, and the unquantized tokens too, into several groups.
    """
    sizes = Counter(page.nbytes for page in pages.values())
    if len(sizes) < 2 or len(set(sizes.values())) > 1:
        return pages
    small, large = sorted(sizes)[:2]
    name, page = next((name, page) for name, page in pages.items() if page.nbytes == small)
    return pages | {name: replace(page, padding=large - small)}
