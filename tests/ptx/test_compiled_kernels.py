"""Small kernels of Triton's, compiled for both chips: reductions, matrix products of every way that we use."""

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402

from tests.ptx.driver import chip  # noqa: E402

CHIPS = (80, 90)


@triton.jit
def _softmax(x, z, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * n + places, mask=places < n, other=float("-inf"))
    powers = tl.exp(row - tl.max(row, 0))
    tl.store(z + tl.program_id(0) * n + places, powers / tl.sum(powers, 0), mask=places < n)


@triton.jit
def _product(a, b, c, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, depth, K, num_stages=3):
        left = tl.load(a + row[:, None] * depth + (first + k)[None, :])
        if TURNED:
            right = tl.load(b + column[None, :] * depth + (first + k)[:, None])
        else:
            right = tl.load(b + (first + k)[:, None] * N + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + row[:, None] * N + column[None, :], total)


@pytest.mark.parametrize("number", CHIPS)
@pytest.mark.parametrize("n", [3, 100, 700])
def test_softmax(number: int, n: int) -> None:
    x = torch.randn(5, n)
    found = torch.full_like(x, torch.nan)
    with chip(number):
        _softmax[(5,)](x, found, n, BLOCK=triton.next_power_of_2(n))
    torch.testing.assert_close(found, x.softmax(-1))


@pytest.mark.parametrize("number", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("m", "n"), [(16, 64), (128, 128)])
def test_products(number: int, dtype: torch.dtype, turned: bool, m: int, n: int) -> None:
    """Tensor cores of one warp, or on sm_90 of four from 64 rows on; operands copied in the background."""
    depth = 96
    a, b = torch.randn(m, depth).to(dtype), torch.randn(depth, n).to(dtype)
    found = torch.full((m, n), torch.nan)
    with chip(number):
        _product[(1,)](a, b.T.contiguous() if turned else b, found, depth, M=m, N=n, K=32, TURNED=turned)
    torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)
