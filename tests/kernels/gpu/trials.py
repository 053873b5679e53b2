"""The Triton kernels beside the reference: on a GPU, in Triton's interpreter, or as they are compiled for a chip."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.append_pair import Pair
from tests.kernels.attend_cases import TOLERANCE, Case
from tests.kernels.covering import Combination
from tests.kernels.engine import PagedPair
from tests.kernels.every_pair import PAGES, Choices, case_of, layout_of, start_of, state_dtype_of

triton_append = pytest.importorskip("kvmix_compile.kernels.gpu.append")
triton_attend = pytest.importorskip("kvmix_compile.kernels.gpu.attend")
code_rows = pytest.importorskip("kvmix_compile.kernels.gpu.code_rows")

SMALLEST_QUERY_TILE = triton_attend.SMALLEST_QUERY_TILE
PLACES: Choices = {"page": (None, *PAGES)}
LAUNCHES: Choices = {
    "splits": (1, 2, 4),
    "blocks": (1, 2),
    "query_tile": (SMALLEST_QUERY_TILE, 64),
    "warps": (2, 4, 8),
    "from_codes": (False, True),
}


def in_long_runs(device: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test that takes a minute of Triton's interpreter, and not of a GPU."""
    return pytest.mark.choices if device == "cpu" else lambda test: test


def check_attend(
    case: Case,
    splits: int,
    blocks: int,
    weighting: Weighting | None = None,
    query_tile: int = SMALLEST_QUERY_TILE,
    warps: int = 4,
    device: str = "cpu",
    from_codes: bool = False,
    page: tuple[int, int] | None = None,
) -> float:
    """The largest difference from the reference; at most the tolerance of the dtype, or an AssertionError.

    from_codes: whether codes are multiplied as they are, where they can be.
    page: tokens and blocks of pages that hold what the state does; None: the state itself.
    """
    expected = reference.attend(*case.arguments(weighting))
    queries = case.q.shape[1] // case.layout.kv_heads * case.q.shape[2]
    if from_codes and rows_can_be_read(case):
        query_tile, blocks, warps = SMALLEST_QUERY_TILE, 1, 1
    else:
        from_codes = False
    launch = triton_attend.Launch(query_tile, -(-queries // query_tile), splits, blocks, warps, from_codes)
    on_device = case.poisoned().mapped(lambda tensor: tensor.to(device))
    arguments = on_device.paged_arguments(page, weighting, device) if page else on_device.arguments(weighting)
    attended = triton_attend.attend(*arguments, launch=launch)
    assert attended.dtype == case.q.dtype and attended.is_contiguous()
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(attended.cpu(), expected, rtol=tolerance, atol=tolerance)
    return (attended.cpu().double() - expected.double()).abs().max().item() if expected.numel() else 0.0


def rows_can_be_read(case: Case) -> bool:
    """Also where it does not pay."""
    key_dim, value_dim = case.layout.key_dim, case.layout.value_dim
    rows = code_rows.rows_of_keys(case.layout.key, key_dim, 2), code_rows.rows_of_values(case.layout.value, value_dim)
    return all(rows) and case.q.dtype == torch.bfloat16 and max(key_dim, value_dim) <= triton_attend.WIDEST_OF_CODES


def check_chosen_attend(chosen: Combination, device: str = "cpu") -> float:
    """As check_attend, of choices of every_pair.ATTENDING and LAUNCHES."""
    case, weighting = case_of(chosen)
    launch = {name: chosen[name] for name in LAUNCHES}
    return check_attend(case, weighting=weighting, device=device, page=chosen["page"], **launch)


def check_chosen_append(chosen: Combination, device: str = "cpu") -> None:
    """The reference's bytes, of choices of every_pair.APPENDING, or an AssertionError."""
    made = layout_of(chosen), 2, state_dtype_of(chosen)
    page: tuple[int, int] | None = chosen["page"]
    pair: Pair | PagedPair = (
        PagedPair(triton_append.append, *made, page, device) if page else Pair(triton_append.append, *made, device)
    )
    for tokens in chosen["chunks"]:
        k, v = random_chunk(pair.layout, 2, tokens, chosen["dtype"], 1.0)
        start = start_of(chosen, tokens)
        k[0, :, :start] = v[0, :, :start] = torch.nan
        pair.append(k, v, torch.tensor([start, 0]))
    pair.check()


def beyond_half_precision(bits: int) -> Case:
    """A case of float16 in which scales and zero points make elements that it has no numbers for."""
    key, value = Precision(bits, 32, 4), Precision(bits, 16, 4)
    layout = StateLayout(SiteShape(1, 16, 16), key=key, value=value, sinks=0, recent=32)
    case = Case.random(layout, 1, [70], [0], 1, torch.float16)
    k, v = (torch.full((1, 1, 70, 16), 65504.0, dtype=torch.float16) for _ in range(2))
    k[..., ::2, :], v[..., ::2, :] = -60000.0, -60000.0
    nothing = torch.zeros(1, dtype=torch.int64)
    reference.append(Chunk(key=k, value=v, lengths=nothing, starts=nothing), case.state, layout.storage)
    return replace(case, q=case.q * 1e-5)


def random_chunk(layout: StateLayout, batch: int, tokens: int, dtype: torch.dtype, size: float) -> list[Tensor]:
    """Keys and values."""
    largest = torch.finfo(dtype).max
    return [
        (torch.randn(batch, tokens, layout.kv_heads, dim) * size).clamp(-largest, largest).to(dtype).transpose(1, 2)
        for dim in (layout.key_dim, layout.value_dim)
    ]
