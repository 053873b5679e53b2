"""The Triton kernel of attend against the reference: on a GPU, else in Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import Case, cases, weighted
from tests.kernels.covering import Combination, covering, named
from tests.kernels.every_pair import ATTENDING, PAGES, fits
from tests.kernels.gpu.trials import (
    LAUNCHES,
    PLACES,
    beyond_half_precision,
    check_attend,
    check_chosen_attend,
    in_long_runs,
)
from tests.kernels.layouts import IMPORTANT_BITS

triton_attend = pytest.importorskip("kvmix_compile.kernels.gpu.attend")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    # The whole module, whose covering array takes a second to be drawn.
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)


def check(case: Case, splits: int, blocks: int, weighting: Weighting | None = None, query_tile: int = 16) -> None:
    check_attend(case, splits, blocks, weighting, query_tile, device=DEVICE)


def check_both(case: Case) -> None:
    """By elements and from codes."""
    for from_codes in (False, True):
        check_attend(case, splits=2, blocks=1, device=DEVICE, from_codes=from_codes)


@pytest.mark.parametrize("chosen", covering(ATTENDING | LAUNCHES | PLACES, fits, together=1), ids=named)
def test_each_choice(chosen: Combination) -> None:
    check_chosen_attend(chosen, DEVICE)


@in_long_runs(DEVICE)
@pytest.mark.parametrize("chosen", covering(ATTENDING | LAUNCHES | PLACES, fits), ids=named)
def test_every_two_choices_meet(chosen: Combination) -> None:
    check_chosen_attend(chosen, DEVICE)


@settings(max_examples=40)
@given(weighted(cases()), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_it_is_the_reference(case: tuple[Case, Weighting], splits: int, blocks: int) -> None:
    check(case[0], splits, blocks, case[1])


@settings(max_examples=20)
@given(weighted(cases()), st.sampled_from([1, 2]))
def test_it_reads_a_state_that_grew(case: tuple[Case, Weighting], splits: int) -> None:
    """A ring of no slots is none to it: on a GPU there are none."""
    check(case[0].as_grown(least_slots=1), splits, 1, case[1])


@settings(max_examples=15)
@given(weighted(cases()), st.sampled_from([1, 2]), st.sampled_from(PAGES))
def test_it_reads_pages(case: tuple[Case, Weighting], splits: int, page: tuple[int, int]) -> None:
    check_attend(case[0], splits, 1, case[1], device=DEVICE, page=page)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_heads_of_real_models(key_dim: int, value_dim: int, bits: int) -> None:
    group = 32 if value_dim % 32 == 0 else value_dim // 2
    key, value = Precision(bits, 32, 4), Precision(bits, group, 16 if bits % 2 else 4)
    layout = StateLayout(SiteShape(1, key_dim, value_dim), key=key, value=value, sinks=4, recent=32)
    check_both(Case.random(layout, 4, [131], [0], 1, torch.bfloat16))


@pytest.mark.parametrize(("important_bits", "bits"), IMPORTANT_BITS)
def test_keys_with_important_channels(important_bits: tuple[int, ...], bits: int) -> None:
    for key_dim, group, scale_bits in ((64, 32, 4), (80, 16, 4), (96, 32, 4), (128, 16, 16)):
        key = Precision(bits, group, scale_bits, important_bits)
        if not key.fits(key_dim, Axis.TOKENS):
            continue
        layout = StateLayout(SiteShape(1, key_dim, 64), key=key, value=Precision(2, 32, 4), sinks=4, recent=32)
        check_both(Case.random(layout, 4, [131], [0], 1, torch.bfloat16))


@pytest.mark.parametrize("length", [*range(94, 100), 126, 127, 128, 129, 190, 191, 192, 193])
def test_around_every_split(length: int) -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(3, 16, 4), sinks=0, recent=32)
    for splits in (2, 4, 8):
        check(Case.random(layout, 2, [length], [0], 1, torch.float32), splits, 1)


def test_a_tile_of_many_queries() -> None:
    layout = StateLayout(SiteShape(1, 16, 16), key=Precision(2), value=Precision(3, 16, 4), sinks=2, recent=32)
    case = Case.random(layout, 3, [100, 3], [0, 20], 50, torch.float32)
    for weighting in (None, Weighting(0.25, sliding_window=20), Weighting(0.25, attention_chunk=30)):
        check(case, 2, 2, weighting, query_tile=64)


def test_elements_beyond_half_precision_stay_finite() -> None:
    check(beyond_half_precision(2), 2, 1)


@pytest.mark.parametrize(
    ("queries", "pairs", "most_tokens", "widest", "itemsize", "expected"),
    [
        (4, 8, 32768, 128, 2, (16, 1, 64, 2, 4)),
        (4, 1024, 32768, 128, 2, (16, 1, 1, 2, 4)),
        (4, 8, 128, 128, 2, (16, 1, 2, 2, 4)),
        (512, 8, 32768, 128, 2, (64, 8, 16, 2, 8)),
        (4, 8, 32768, 64, 2, (16, 1, 64, 2, 2)),
        (4, 8, 32768, 64, 4, (16, 1, 64, 2, 4)),
        (4, 8, 32768, 96, 2, (16, 1, 64, 2, 4)),
        (4, 8, 32768, 96, 4, (16, 1, 64, 1, 4)),
        (4, 8, 32768, 80, 2, (16, 1, 64, 1, 4)),
        (4, 8, 32768, 256, 2, (16, 1, 64, 2, 8)),
    ],
)
def test_a_launch_is_chosen_from_shapes(
    queries: int, pairs: int, most_tokens: int, widest: int, itemsize: int, expected: tuple[int, ...]
) -> None:
    launch = triton_attend.Launch.choose(queries, pairs, most_tokens, widest, itemsize, multiprocessors=132)
    assert (launch.query_tile, launch.query_tiles, launch.splits, launch.blocks, launch.warps) == expected


KEYS = Precision(2, 32, 4, (4, 3))
NARROW_RUNS, WIDE = Precision(2, 16, 4), Precision(8, 32, 4)


@pytest.mark.parametrize(
    ("key", "value", "dims", "dtype", "expected"),
    [
        (KEYS, Precision(3, 16, 4), (128, 128), torch.bfloat16, True),
        (KEYS, Precision(2, 64, 4), (64, 64), torch.bfloat16, True),
        (KEYS, Precision(1, 32, 4), (96, 64), torch.bfloat16, True),
        (KEYS, Precision(2, 32, 4), (128, 128), torch.float16, False),
        (Precision(2, 16, 4), Precision(2, 32, 4), (128, 128), torch.bfloat16, True),
        (Precision(2, 16, 4), Precision(2, 32, 4), (64, 64), torch.bfloat16, False),
        (KEYS, NARROW_RUNS, (80, 80), torch.bfloat16, False),
        (KEYS, WIDE, (64, 64), torch.bfloat16, False),
        (Precision(16), Precision(2, 32, 4), (64, 64), torch.bfloat16, False),
    ],
)
def test_codes_are_multiplied_where_they_lie_so(
    key: Precision, value: Precision, dims: tuple[int, int], dtype: torch.dtype, expected: bool
) -> None:
    assert triton_attend.has_codes(Storage(key, value, 128), *dims, dtype) is expected


def test_few_queries_are_multiplied_with_codes_by_single_warps() -> None:
    chosen = [triton_attend.Launch.choose(queries, 8, 32768, dim, 2, 132, True) for queries, dim in LAUNCHED]
    assert [(each.from_codes, each.warps, each.blocks, each.splits) for each in chosen] == [
        (True, 1, 1, 128),
        (True, 1, 1, 128),
        (False, 4, 2, 64),
        (False, 8, 2, 64),
    ]


LAUNCHED = [(4, 128), (16, 64), (17, 64), (4, 256)]


def test_no_rows_give_no_output() -> None:
    layout = StateLayout(SiteShape(1, 16, 24), key=Precision(2), value=Precision(3, 8), sinks=2, recent=32)
    state = SiteState.allocate(layout, 0, 1, torch.float32)
    q = torch.empty(0, 2, 1, 16)
    none = torch.empty(0, dtype=torch.int64)
    chunk = Chunk(key=torch.empty(0, 1, 1, 16), value=torch.empty(0, 1, 1, 24), lengths=none, starts=none)
    output = triton_attend.attend(q, chunk, state, layout.storage, Weighting(1.0))
    assert output.shape == (0, 2, 1, 24)
