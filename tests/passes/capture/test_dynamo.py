"""Dynamo's graphs, traced again: what is lost on the way is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from kvmix_compile.passes.capture.dynamo import Lowered, check_whole, lower
from kvmix_compile.passes.errors import CaptureError

pytestmark = pytest.mark.usefixtures("dynamo_begins_anew")


def lowered(function: Callable[..., Tensor], *inputs: Tensor) -> Lowered:
    found: list[Lowered] = []

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        found.append(lower(module, inputs))
        return module.forward

    torch.compile(function, backend=backend)(*inputs)
    (graph,) = found
    return graph


def recurrence(decay: Tensor, x: Tensor) -> Tensor:
    def joined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return associative_scan(joined, (decay, x), dim=1, combine_mode="generic")[1] + 1


def test_an_associative_scan_cannot_be_traced_twice() -> None:
    graph = lowered(recurrence, torch.rand(2, 7, 3), torch.rand(2, 7, 3))
    with pytest.raises(CaptureError, match=r"line \d+, in .* under torch\.vmap.* use kvmix_compile\.apply"):
        check_whole(graph)


def test_constants_of_the_model_are_no_loss() -> None:
    table = torch.rand(5)
    check_whole(lowered(lambda x: (x * table + torch.tensor([1.0, 2, 3, 4, 5])).relu(), torch.rand(3, 5)))
