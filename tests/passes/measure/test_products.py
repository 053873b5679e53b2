"""Products of 16-bit numbers on a CPU are computed in float32, in a forward pass and in its backward pass."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.measure import products
from kvmix_compile.passes.measure.importance import measure
from kvmix_compile.passes.measure.products import products_in_float32
from tests.helpers.toy_llama import RECENT, SINKS, ids

HALF = [torch.float16, torch.bfloat16]


class Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


class Converted(TorchDispatchMode):
    """Elements of all 16-bit tensors that are converted."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].dtype in HALF:
            self.elements.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def measured(dtype: torch.dtype) -> tuple[Any, list[torch.dtype]]:
    captured = capture(tiny("gpt2").to(dtype))
    with Products() as found:
        rows = [ids(1, 96)[0]]
        importance = measure(captured, find_sites(captured).matched, rows, sinks=SINKS, recent=RECENT)
    return importance, found.dtypes


@pytest.mark.parametrize("dtype", HALF)
def test_measuring_multiplies_in_float32_alone(dtype: torch.dtype) -> None:
    importance, dtypes = measured(dtype)
    assert len(dtypes) > 20 and set(dtypes) == {torch.float32}
    exact, _ = measured(torch.float32)
    for site, expected in zip(importance.sites, exact.sites, strict=True):
        assert site.key_gradient_norm == pytest.approx(expected.key_gradient_norm, rel=0.05)
        assert site.value_gradient_norm == pytest.approx(expected.value_gradient_norm, rel=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_results_and_gradients_are_float32s_rounded(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(24, 16).to(dtype), torch.randn(5, 24, dtype=dtype, requires_grad=True)
    with products_in_float32(layer):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(gradient, (torch.ones_like(exact) @ layer.weight.float()).to(dtype))


def test_a_model_of_float32_is_left_to_itself() -> None:
    layer = nn.Linear(24, 16)
    with products_in_float32(layer), Products() as found:
        layer(torch.randn(5, 24))
    assert found.dtypes == [torch.float32]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("features", "made"), [(24, 30), (30, 24)])
def test_of_large_weights_a_part_is_in_float32_at_a_time(
    dtype: torch.dtype, features: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PART", 7 * 24)
    layer, x = nn.Linear(features, made, bias=False).to(dtype), torch.randn(5, features, dtype=dtype).requires_grad_()
    with Converted() as converted, products_in_float32(layer):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
    exact = F.linear(x.float(), layer.weight.float())
    torch.testing.assert_close(y, exact.to(dtype))
    torch.testing.assert_close(gradient, (torch.ones_like(exact) @ layer.weight.float()).to(dtype))
    assert 0 < max(converted.elements) <= 7 * 24
