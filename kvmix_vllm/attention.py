"""Attention of a step's rows to their pages, and to their own tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import packed_blocks
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.ops import attend_arguments
from kvmix_compile.kernels.stepwise import slots_before
from kvmix_compile.kernels.weighting import Weighting


def attend(query: Tensor, chunk: Chunk, pages: Pages, storage: Storage, weighting: Weighting) -> Tensor:
    """As kernels.paged.attend, `[tokens of all rows, query heads, value_dim]`: rows one behind the other."""
    given, extras = attend_arguments(query, chunk, pages, storage, weighting)
    return torch.ops.kvmix.attend_paged(*given, **extras).transpose(1, 2).flatten(0, 1)


def attend_exactly(
    query: Tensor, chunk: Chunk, held: int, pages: Pages, storage: Storage, weighting: Weighting
) -> Tensor:
    """As attend, of one row, as if its tokens had come one by one (kernels.stepwise): each reads what lies behind its
    recent window as it is stored, its own chunk's tokens too. The chunk, in the pages' dtype, has been appended.

    held: the tokens of the row before its chunk.
    """
    tokens, unpacked = query.shape[2], pages.sinks + storage.recent
    if held + tokens <= unpacked:
        # Nothing is packed yet, or ever.
        return attend(query, chunk, pages, storage, weighting)
    before = slots_before(held, unpacked)
    # What stands behind the last token is seen by no token, and what is found for it is left out.
    behind = -(before + tokens) % BLOCK_TOKENS

    def cut(given: Tensor) -> Tensor:
        return pad(given[0], (0, 0, before, behind)).unflatten(1, (-1, BLOCK_TOKENS)).transpose(0, 1)

    first = torch.arange(-before, tokens, BLOCK_TOKENS, device=query.device)
    rows = Chunk(
        key=cut(chunk.key),
        value=cut(chunk.value),
        lengths=held + first.clamp(min=0),
        starts=(-first).clamp(min=0),
    )
    with_chunk = _with_chunk(chunk, held, pages, storage, len(first))
    return attend(cut(query), rows, with_chunk, storage, weighting)[before : before + tokens]


def _with_chunk(chunk: Chunk, held: int, pages: Pages, storage: Storage, rows: int) -> Pages:
    """The pages of one row, where tokens of its chunk that are packed already lie in none, with all of the chunk's
    tokens in pages of their own; as many rows, all alike.
    """
    size, device = pages.raw_tokens, pages.raw.device
    end = held + chunk.key.shape[2]
    first = pages.sinks + BLOCK_TOKENS * packed_blocks(held, pages.sinks, storage.recent)
    numbers = sorted({*range(-(-min(pages.sinks, end) // size)), *range(first // size, -(-end // size))})
    number = torch.tensor(numbers, device=device)
    known = pad(pages.raw[0], (0, numbers[-1] + 1), value=-1)[number].clamp(min=0)
    table = torch.full((numbers[-1] + 1,), -1, dtype=torch.int32, device=device)
    table[number] = torch.arange(len(numbers), dtype=torch.int32, device=device)
    token = torch.arange(held, end, device=device)
    page, place = table[token // size].long(), token % size

    def pool(kept: Tensor, tokens: Tensor) -> Tensor:
        copied = kept[known]
        copied[page, :, place] = tokens[0].transpose(0, 1)
        return copied

    return pages._replace(
        raw=table.expand(rows, -1),
        packed=pages.packed.expand(rows, -1),
        raw_k=pool(pages.raw_k, chunk.key),
        raw_v=pool(pages.raw_v, chunk.value),
    )
