"""A serving engine as kernels see one: it owns pages and hands them out to rows, in no order, and takes them back.

What it gives is the least that format/pages.py asks for. Pages that no row needs are full of what is no number, and are
given again; entries of the tables that must not be read are no page's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.state import ENDLESS, SiteState, StateLayout, packed_blocks

# An entry that stands for no page, and what stands where none may be read.
NO_PAGE, UNREADABLE = -1, 2**31 - 1


@dataclass
class Memory:
    """Pages of one kind: a pool of keys and one of values, and a table of each row's.

    size: tokens or blocks of a page. held: the pages of each row by their places in it.
    """

    keys: Tensor
    values: Tensor
    size: int
    held: list[dict[int, int]]
    random: Random
    free: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, rows: int, heads: int, dims: tuple[int, int], size: int, most: int, dtype: torch.dtype, random: Random
    ) -> "Memory":
        """most: tokens or blocks of a row. Keys and values lie side by side in one buffer, as vLLM has them."""
        pages = rows * -(-most // size) + 3
        buffer = torch.empty(pages, size, heads, sum(dims), dtype=dtype)
        keys, values = buffer.transpose(1, 2).split(dims, dim=-1)
        memory = cls(keys, values, size, [{} for _ in range(rows)], random, list(range(pages)))
        for page in memory.free:
            memory._fill(page)
        return memory

    def keep(self, row: int, numbers: set[int]) -> None:
        """Those pages of a row that hold these tokens or blocks, and no others."""
        wanted = {number // self.size for number in numbers}
        for index in [index for index in self.held[row] if index not in wanted]:
            page = self.held[row].pop(index)
            self._fill(page)
            self.free.append(page)
        for index in sorted(wanted - self.held[row].keys()):
            self.held[row][index] = self.free.pop(self.random.randrange(len(self.free)))

    def table(self, kept: list[int], ends: list[int]) -> Tensor:
        """Tokens or blocks of rows up to `kept` are there already, those up to `ends` are to come."""
        rows = []
        for held, had, end in zip(self.held, kept, ends, strict=True):
            pages = range(-(-max([*ends, 1]) // self.size))
            written = [had < (page + 1) * self.size and page * self.size < end for page in pages]
            rows.append([held.get(page, NO_PAGE if written[page] else UNREADABLE) for page in pages])
        return torch.tensor(rows, dtype=torch.int32)

    def at(self, row: int, number: int) -> tuple[Tensor, Tensor]:
        """The key and the value, [H, extent] each, of a token or a block."""
        page, place = self.held[row][number // self.size], number % self.size
        return self.keys[page, :, place], self.values[page, :, place]

    def _fill(self, page: int) -> None:
        for pool in (self.keys, self.values):
            pool[page] = torch.nan if pool.is_floating_point() else 0xFF


class Engine:
    """Two memories for some rows of a site.

    page: tokens of a raw page, and blocks of a packed one.
    """

    def __init__(
        self, layout: StateLayout, rows: int, dtype: torch.dtype, page: tuple[int, int], most_tokens: int = 420
    ) -> None:
        self.layout, random = layout, Random(0)
        dims = layout.key_dim, layout.value_dim
        block_bytes = (
            layout.key.block_bytes(dims[0], dtype.itemsize),
            layout.value.block_bytes(dims[1], dtype.itemsize),
        )
        self.raw = Memory.of(rows, layout.kv_heads, dims, page[0], most_tokens, dtype, random)
        most_blocks = packed_blocks(most_tokens, layout.sinks, layout.recent)
        self.packed = Memory.of(rows, layout.kv_heads, block_bytes, page[1], most_blocks, torch.uint8, random)

    def tokens(self, length: int, first: int) -> set[int]:
        """Those of a row of so many that are kept unquantized, where none before `first` is seen any more."""
        sinks, recent = self.layout.sinks, self.layout.recent
        waiting = first if recent == ENDLESS else sinks + 32 * packed_blocks(length, sinks, recent)
        return {*range(first, min(sinks, length)), *range(waiting, length)}

    def blocks(self, length: int, first: int) -> set[int]:
        """Those of a row that are packed and seen."""
        sinks, recent = self.layout.sinks, self.layout.recent
        return set(range(max(0, first - sinks) // 32, packed_blocks(length, sinks, recent)))

    def first_seen(self, length: int) -> int:
        """By the token that follows so many."""
        return max(0, length - self.layout.window + 1) if self.layout.window else 0

    def keep(self, row: int, *lengths: int) -> None:
        """Pages for what a row needs when it has one of these lengths."""
        seen = [(length, self.first_seen(length)) for length in lengths]
        self.raw.keep(row, set().union(*(self.tokens(*each) for each in seen)))
        self.packed.keep(row, set().union(*(self.blocks(*each) for each in seen)))

    def hold(self, state: SiteState, lengths: list[int], first: list[int]) -> None:
        """What a state has, of rows of which nothing is seen before the tokens `first`."""
        sinks = self.layout.sinks
        for row, (length, seen) in enumerate(zip(lengths, first, strict=True)):
            tokens, blocks = self.tokens(length, seen), self.blocks(length, seen)
            self.raw.keep(row, tokens), self.packed.keep(row, blocks)
            for token in tokens:
                key, value = self.raw.at(row, token)
                slot = (token - sinks) % max(1, state.recent_slots)
                in_sink = token < sinks
                key.copy_(state.sink_k[row, :, token] if in_sink else state.recent_k[row, :, slot])
                value.copy_(state.sink_v[row, :, token] if in_sink else state.recent_v[row, :, slot])
            for block in blocks:
                key, value = self.packed.at(row, block)
                key.copy_(state.packed_k[row, :, block % state.blocks])
                value.copy_(state.packed_v[row, :, block % state.blocks])

    def share_pages(self) -> None:
        """All rows have the first one's pages."""
        for memory in (self.raw, self.packed):
            memory.held = [dict(memory.held[0]) for _ in memory.held]

    def pages(self, lengths: list[int], ends: list[int], device: str | None = None) -> Pages:
        """What a call is given whose chunks take rows from these lengths to those.

        device: where copies of the pools go to; None: these themselves.
        """
        sinks, recent = self.layout.sinks, self.layout.recent
        before, after = ([packed_blocks(length, sinks, recent) for length in each] for each in (lengths, ends))
        tables = self.raw.table(lengths, ends), self.packed.table(before, after)
        pools = (self.raw.keys, self.raw.values, self.packed.keys, self.packed.values)
        if device is None:
            return Pages(*tables, *pools, sinks=sinks)
        return Pages(*(tensor.clone().to(device) for tensor in (*tables, *pools)), sinks=sinks)


class PagedPair:
    """As append_pair.Pair: pages that a kernel of append writes beside a state that the reference writes.

    device: where the kernel has copies of them.
    """

    def __init__(
        self,
        kernel: Callable[..., None],
        layout: StateLayout,
        batch: int,
        dtype: torch.dtype,
        page: tuple[int, int],
        device: str | None = None,
        most_tokens: int = 420,
    ) -> None:
        self.kernel, self.layout, self.device = kernel, layout, device
        self.expected = SiteState.allocate(layout, batch, layout.required_blocks(most_tokens), dtype)
        self.engine = Engine(layout, batch, dtype, page, most_tokens)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def append(self, k: Tensor, v: Tensor, starts: Tensor) -> None:
        chunk, storage, engine = Chunk(k, v, self.lengths, starts), self.layout.storage, self.engine
        reference.append(chunk, self.expected, storage)
        ends = self.lengths + k.shape[2] - starts
        lengths = list(zip(self.lengths.tolist(), ends.tolist(), strict=True))
        for row, (length, end) in enumerate(lengths):
            engine.keep(row, length, end)
        pages = engine.pages(*(list(each) for each in zip(*lengths, strict=True)), device=self.device)
        self.kernel(Chunk(*(tensor.to(self.device or "cpu") for tensor in chunk)), pages, storage)
        self._copy_back(pages)
        for row, (_, end) in enumerate(lengths):
            engine.keep(row, end)
        self.lengths = ends

    def check(self) -> None:
        expected, sinks = self.expected, self.layout.sinks
        for row, length in enumerate(self.lengths.tolist()):
            first = self.engine.first_seen(length)
            for token in self.engine.tokens(length, first):
                if token < sinks:
                    there: Any = expected.sink_k[row, :, token], expected.sink_v[row, :, token]
                else:
                    slot = (token - sinks) % expected.recent_slots
                    there = expected.recent_k[row, :, slot], expected.recent_v[row, :, slot]
                assert_same_bytes(self.engine.raw.at(row, token), there, f"token {token} of row {row}")
            for block in self.engine.blocks(length, first):
                place = block % expected.blocks
                there = expected.packed_k[row, :, place], expected.packed_v[row, :, place]
                assert_same_bytes(self.engine.packed.at(row, block), there, f"block {block} of row {row}")

    def _copy_back(self, pages: Pages) -> None:
        if self.device is not None:
            memories = self.engine.raw, self.engine.packed
            pools = [pool for memory in memories for pool in (memory.keys, memory.values)]
            for pool, written in zip(pools, pages.tensors()[2:], strict=True):
                pool.copy_(written)


def assert_same_bytes(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], where: str) -> None:
    for ours, theirs, name in zip(found, expected, ("keys", "values"), strict=True):
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), (name, where)
