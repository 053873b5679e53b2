"""append and attend over pages: what they are over a state, wherever the pages lie.

The reference and the CPU's kernels, each beside itself; Triton's are in gpu/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.kernels import paged, reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu import binding as cpu
from kvmix_compile.kernels.cpu import paged as cpu_paged
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.kernels.errors import KVMixError
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.stepwise import stepwise
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import Case, cases, weighted
from tests.kernels.covering import Combination, covering, named
from tests.kernels.engine import Engine, PagedPair
from tests.kernels.every_pair import APPENDING, ATTENDING, PAGES, case_of, fits, layout_of, start_of
from tests.kernels.layouts import drawn_layouts, with_window
from tests.kernels.page_checks import LAYOUT, check_left_out, check_shared_pages


@dataclass(frozen=True)
class Kernels:
    """Over pages, and over a state."""

    append: Callable[..., None]
    attend: Callable[..., Tensor]
    append_state: Callable[..., None]
    attend_state: Callable[..., Tensor]


KERNELS = {
    "reference": Kernels(paged.append, paged.attend, reference.append, reference.attend),
    "cpu": Kernels(cpu_paged.append, cpu_paged.attend, cpu.append, cpu.attend),
}
each_kernel = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)

pages = st.sampled_from(PAGES)
layouts = drawn_layouts(
    st.builds(Precision, st.sampled_from([2, 16]), st.just(32)),
    st.builds(Precision, st.sampled_from([3, 16]), st.just(8), st.just(4)),
    key_dims=[16],
    value_dims=[16, 24],
    sinks=[0, 3, 40],
    recent=[32, 45],
)


@pytest.mark.parametrize("chosen", covering(APPENDING | {"page": PAGES}, fits), ids=named)
def test_every_two_choices_of_append_meet(chosen: Combination) -> None:
    for kernels in KERNELS.values():
        pair = PagedPair(kernels.append, layout_of(chosen), 2, chosen["dtype"], chosen["page"])
        for tokens in chosen["chunks"]:
            chunk = [torch.randn(2, chosen["kv_heads"], tokens, dim) for dim in chosen["dimensions"]]
            pair.append(*(side.to(chosen["dtype"]) for side in chunk), torch.tensor([start_of(chosen, tokens), 0]))
            pair.check()


@settings(max_examples=50)
@given(st.sampled_from([*KERNELS.values()]), layouts, pages, st.data())
def test_append_writes_the_bytes_of_a_state(
    kernels: Kernels, layout: StateLayout, page: tuple[int, int], data: st.DataObject
) -> None:
    pair = PagedPair(kernels.append, layout, 2, torch.float32, page)
    for tokens in data.draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 20, 33, 110]), min_size=1, max_size=6)):
        starts = torch.tensor([data.draw(st.sampled_from([0, 0, tokens // 2, tokens])) for _ in range(2)])
        k, v = (torch.randn(2, layout.kv_heads, tokens, dim) for dim in (layout.key_dim, layout.value_dim))
        pair.append(k, v, starts)
        pair.check()


@pytest.mark.parametrize("chosen", covering(ATTENDING | {"page": PAGES}, fits), ids=named)
def test_every_two_choices_of_attend_meet(chosen: Combination) -> None:
    check(*case_of(chosen), chosen["page"])


@settings(max_examples=100)
@given(weighted(cases(values_are_keys=(False, False, True))), pages)
def test_attend_reads_what_a_state_holds(case: tuple[Case, Weighting], page: tuple[int, int]) -> None:
    check(*case, page)


def check(case: Case, weighting: Weighting, page: tuple[int, int]) -> None:
    arguments = case.paged_arguments(page, weighting)
    for kernels in KERNELS.values():
        attended = kernels.attend(*arguments)
        assert attended.is_contiguous()
        assert torch.equal(attended, kernels.attend_state(*case.arguments(weighting)))


@each_kernel
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("cuts", [[170], [57, 1, 112]])
def test_stepwise_is_what_it_is_over_a_state(cuts: list[int], window: int, kernels: Kernels) -> None:
    """Two rows, one with padding, and no more pages than append needs."""
    layout, weighting = with_window(LAYOUT, window), Weighting(0.25, sliding_window=window)
    over_state = stepwise(kernels.attend_state, kernels.append_state)
    over_pages = paged.stepwise(kernels.attend, kernels.append, over_state)
    state = SiteState.allocate(layout, 2, layout.required_blocks(170), torch.float32)
    queries, found = torch.empty(0), list[Tensor]()

    def attend_and_append(chunk: Chunk, pages: Pages, storage: Storage) -> None:
        found.append(over_pages(queries, chunk, pages, storage, weighting))

    pair = PagedPair(attend_and_append, layout, 2, torch.float32, (32, 1))
    for tokens in cuts:
        queries, (k, v) = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, 1, tokens, 16)
        starts = (torch.tensor([0, 11]) - pair.lengths[0]).clamp(0, tokens)
        expected = over_state(queries, Chunk(k, v, pair.lengths, starts), state, layout.storage, weighting)
        pair.append(k, v, starts)
        assert torch.equal(found[-1], expected)
    pair.check()


@each_kernel
@pytest.mark.parametrize("tokens", [1, 70])
def test_rows_share_pages_and_complete_the_same_block_of_them(tokens: int, kernels: Kernels) -> None:
    check_shared_pages(kernels.append, tokens)


@each_kernel
def test_what_has_no_page_is_left_out(kernels: Kernels) -> None:
    check_left_out(kernels.append)


@pytest.mark.skipif(library() is None, reason="there is no C++ compiler, or KVMIX_CPU_KERNELS=0")
def test_no_token_reaches_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: Any) -> None:
        raise AssertionError

    pair = PagedPair(cpu_paged.append, LAYOUT, 2, torch.float32, (32, 1))
    monkeypatch.setattr(paged, "append", unexpected)
    monkeypatch.setattr(paged, "attend", unexpected)
    for tokens in (1, 70, 1, 33):
        q, k, v = torch.randn(3, 2, 1, tokens, 16).unbind()
        starts = torch.zeros_like(pair.lengths)
        lengths = pair.lengths.tolist()
        if any(lengths):
            chunk, pages = Chunk(k, v, pair.lengths, starts), pair.engine.pages(lengths, lengths)
            assert cpu_paged.attend(q, chunk, pages, LAYOUT.storage, Weighting(0.25)).isfinite().all()
        pair.append(k, v, starts)
    pair.check()


@each_kernel
@pytest.mark.parametrize("entry", [-1, 1000])
def test_what_is_seen_and_has_no_page_is_refused(entry: int, kernels: Kernels) -> None:
    q, chunk, pages, storage, weighting = Case.random(LAYOUT, 1, [100], [0], 1, torch.float32).paged_arguments((32, 1))
    for name, kind in (("raw", "token 99"), ("packed", "block 2")):
        wrong = with_last_entry(pages, name, entry)
        with pytest.raises(KVMixError, match=f"{kind} of row 0 in page {entry} of"):
            kernels.attend(q, chunk, wrong, storage, weighting)


@each_kernel
def test_what_is_to_be_packed_and_has_no_page_is_refused(kernels: Kernels) -> None:
    """With nothing written."""
    k, v, lengths = *torch.randn(2, 1, 1, 99, 16).unbind(), torch.tensor([60])
    engine = Engine(LAYOUT, 1, torch.float32, (32, 1))
    engine.keep(0, 60, 159)
    pages = engine.pages([60], [159])
    before = [pool.clone() for pool in pages.tensors()[2:]]
    # Tokens 35 to 59 wait to be packed; tokens from 128 on, and block 3, are the chunk's.
    for name, index, entry, kind in (
        ("raw", 1, -1, "token .."),
        ("raw", 4, 99, "token 128"),
        ("packed", 3, 99, "block 3"),
    ):
        table = getattr(pages, name).clone()
        table[0, index] = entry
        with pytest.raises(KVMixError, match=f"{kind} of row 0 in page {entry} of"):
            kernels.append(
                Chunk(k, v, lengths, torch.zeros_like(lengths)), pages._replace(**{name: table}), LAYOUT.storage
            )
    for pool, old in zip(pages.tensors()[2:], before, strict=True):
        assert torch.equal(pool.view(torch.uint8), old.view(torch.uint8))


def with_last_entry(pages: Pages, name: str, entry: int) -> Pages:
    table = getattr(pages, name).clone()
    table[0, -1] = entry
    return pages._replace(**{name: table})
