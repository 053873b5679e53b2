"""Attention as if tokens had come one by one: the same as kernels.stepwise, of pages that hold no more than is kept."""

import pytest
import torch

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.weighting import Weighting
from kvmix_vllm.attention import attend, attend_exactly
from kvmix_vllm.pages import Kept
from tests.serving.layouts import layout

PAGE, BLOCKS, HEADS, SIZE = 8, 2, 3, 64
ONE = layout(sinks=4, recent=40)
KEPT = Kept.of(ONE, PAGE)


def empty_pages(length: int, dtype: torch.dtype = torch.float32) -> Pages:
    """With a page for all that is packed of a row of so many tokens, and for each of its tokens."""
    raw = torch.arange(-(-length // PAGE), dtype=torch.int32)[None]
    packed = torch.arange(length // 32 // BLOCKS + 1, dtype=torch.int32)[None]
    bytes_of = [one.block_bytes(SIZE, 4) for one in (ONE.key, ONE.value)]
    return Pages(
        raw,
        packed,
        *(torch.full((raw.shape[1], HEADS, PAGE, SIZE), torch.nan, dtype=dtype) for _ in range(2)),
        *(torch.zeros(packed.shape[1], HEADS, BLOCKS, count, dtype=torch.uint8) for count in bytes_of),
        ONE.sinks,
    )


def holding(pages: Pages, *lengths: int) -> Pages:
    """The same without those pages that rows of none of these lengths keep."""
    kept = [any(KEPT.is_kept(page, length) for length in lengths) for page in range(pages.raw.shape[1])]
    return pages._replace(raw=pages.raw.where(torch.tensor(kept), torch.tensor(-1, dtype=torch.int32)))


@pytest.mark.parametrize("cuts", [(0, 200), (0, 3, 200), (0, 120, 121, 190), (0, 44, 45, 77, 200)])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_it_is_what_stepwise_gives(cuts: tuple[int, ...], kept: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 2 * HEADS, cuts[-1], SIZE, generator=generator)
    key, value = torch.randn(2, 1, HEADS, cuts[-1], SIZE, generator=generator)
    weighting, start = Weighting(scale=SIZE**-0.5), torch.zeros(1, dtype=torch.int64)
    pages, found = empty_pages(cuts[-1], kept), []
    for held, end in zip(cuts, cuts[1:], strict=False):
        chunk = Chunk(key[:, :, held:end], value[:, :, held:end], lengths=torch.tensor([held]), starts=start).in_dtype(
            kept
        )
        step = holding(pages, held, end)
        torch.ops.kvmix.append_paged(*append_arguments(chunk, step, ONE.storage))
        found.append(attend_exactly(query[:, :, held:end], chunk, held, step, ONE.storage, weighting))
    state = SiteState.allocate(ONE, 1, blocks=ONE.required_blocks(cuts[-1]), dtype=kept)
    whole = Chunk(key, value, lengths=start, starts=start)
    given, extras = attend_arguments(query, whole, state, ONE.storage, weighting)
    expected = torch.ops.kvmix.attend_stepwise(*given, **extras)[0].transpose(0, 1)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)


def test_rows_come_one_behind_the_other() -> None:
    query, (key, value) = torch.randn(3, 2 * HEADS, 2, SIZE), torch.randn(2, 3, HEADS, 2, SIZE)
    pages = empty_pages(8)._replace(
        raw=torch.zeros(3, 1, dtype=torch.int32), packed=torch.zeros(3, 1, dtype=torch.int32)
    )
    nothing = torch.zeros(3, dtype=torch.int64)
    found = attend(query, Chunk(key, value, nothing, nothing), pages, ONE.storage, Weighting(scale=1.0))
    assert found.shape == (6, 2 * HEADS, SIZE)
    # The first token of a row sees itself alone.
    torch.testing.assert_close(found[::2], value[:, :, 0].repeat_interleave(2, dim=1))
