"""What a kernel of append over pages is held to beside the bytes that it writes, whatever the device."""

from collections.abc import Callable
from dataclasses import replace

import torch

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout
from tests.kernels.engine import Engine, PagedPair

LAYOUT = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(2, 16, 4), sinks=3, recent=32)


def check_shared_pages(append: Callable[..., None], tokens: int, device: str | None = None) -> None:
    """Texts that begin with the same prompt, of which the last block is packed by the token that follows it."""
    layout, rows = replace(LAYOUT, sinks=16), 3
    prompt = layout.sinks + layout.recent
    k, v = torch.randn(2, rows, 1, prompt + tokens, 16).unbind()
    k[:, :, :prompt], v[:, :, :prompt] = k[0, :, :prompt], v[0, :, :prompt]
    pair = PagedPair(append, layout, rows, torch.float32, (16, 1), device)
    for first in range(rows):
        # All rows but one are padding.
        starts = torch.tensor([0 if row == first else prompt for row in range(rows)])
        pair.append(k[:, :, :prompt], v[:, :, :prompt], starts)
    pair.engine.packed.keep(0, {0})
    pair.engine.share_pages()
    pair.append(k[:, :, prompt:], v[:, :, prompt:], torch.zeros(rows, dtype=torch.int64))
    pair.check()


def check_left_out(append: Callable[..., None], device: str = "cpu") -> None:
    """No place of the pools changes but those of pages that the table names; what has no page is left out."""
    k, v, nothing = *torch.randn(2, 1, 1, 100, 16).unbind(), torch.zeros(1, dtype=torch.int64)
    engine = Engine(LAYOUT, 1, torch.float32, (32, 1))
    engine.keep(0, 100)
    engine.packed.keep(0, {0, 2})
    pages = engine.pages([0], [100], device)
    # Of 100 tokens 3 are sinks, 96 packed, and the last one waits. The tables end before the last page.
    assert (pages.raw >= 0).tolist() == [[True, False, False, True]]
    assert (pages.packed >= 0).tolist() == [[True, False, True]]
    for raw, packed in ((pages.raw, pages.packed), (pages.raw[:, :3], pages.packed[:, :1])):
        named = pages._replace(raw=raw, packed=packed)
        before = [pool.clone() for pool in named.tensors()[2:]]
        append(Chunk(*(tensor.to(device) for tensor in (k, v, nothing, nothing))), named, LAYOUT.storage)
        for table, pool, old in zip((raw, raw, packed, packed), named.tensors()[2:], before, strict=True):
            written = {page for page in table.flatten().tolist() if page >= 0}
            others = [page for page in range(len(pool)) if page not in written]
            assert not torch.equal(pool[[*written]].view(torch.uint8), old[[*written]].view(torch.uint8))
            assert torch.equal(pool[others].view(torch.uint8), old[others].view(torch.uint8))
            pool.copy_(old)
