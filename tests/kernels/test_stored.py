"""The past can be read whole: what a later token reads of it, in the slots where it was."""

from dataclasses import replace

import pytest
import torch

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import ENDLESS, SiteState, StateLayout
from kvmix_compile.kernels.reference import append, stored

LAYOUT = StateLayout(
    SiteShape(kv_heads=2, key_dim=8, value_dim=16, window=0), Precision(16), Precision(16), sinks=4, recent=32
)


@pytest.mark.parametrize("window", [0, 20, 50])
@pytest.mark.parametrize("length", [0, 3, 4, 36, 37, 69, 150])
def test_what_is_read_is_what_was_written(window: int, length: int) -> None:
    layout = replace(LAYOUT, shape=replace(LAYOUT.shape, window=window))
    if 0 < window <= 33:
        layout = replace(layout, sinks=0, recent=ENDLESS)
    key, value = torch.randn(3, 2, length, 8), torch.randn(3, 2, length, 16)
    starts = torch.tensor([0, min(2, length), length])
    state = SiteState.allocate(layout, 3, layout.required_blocks(length), torch.float32)
    append(Chunk(key, value, torch.zeros(3, dtype=torch.int64), starts), state, layout.storage)
    found = stored(state, layout.storage, length - starts, length, torch.float32)
    first = max(0, length - window + 1) if window else 0
    slots = torch.arange(length)
    visible = ((slots >= starts[:, None]) & (slots >= first))[:, None, :, None]
    for read, written in zip(found, (key, value), strict=True):
        assert torch.equal(read * visible, written * visible)
        padding = (slots < starts[:, None])[:, None, :, None]
        assert not (read * padding).any()
