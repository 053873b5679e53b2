"""The benchmark of pages: both are given the same packed blocks, and everything is timed."""

import pytest
import torch

from kvmix_compile.kernels.format.state import SiteState
from tests.helpers.benchmark_modules import benchmark

attention, pages = benchmark("attention"), benchmark("pages")

SHAPE = attention.Shape(2, 256, 2, 2, query_heads=6, kv_heads=2, head_dim=32)


def test_pages_hold_the_blocks_of_the_state() -> None:
    layout = SHAPE.layout()
    state = SiteState.allocate(layout, SHAPE.batch, layout.required_blocks(SHAPE.tokens + 1), torch.float32)
    attention.fill(state)
    made = pages.as_pages(state, SHAPE.tokens)
    assert sorted(made.packed.flatten().tolist()) == list(range(SHAPE.batch * state.blocks))
    for row in range(SHAPE.batch):
        for block, page in enumerate(made.packed[row].tolist()):
            assert torch.equal(made.packed_k[page, :, 0], state.packed_k[row, :, block])
            assert torch.equal(made.packed_v[page, :, 0], state.packed_v[row, :, block])


def test_everything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "DEVICE", "cpu")
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    monkeypatch.setattr(attention, "REPEATS", 1)
    took = pages.measure(SHAPE, torch.float32)
    assert set(took) == {"attend", "attend_paged", "append", "append_paged"} and all(took.values())
