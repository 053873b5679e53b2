"""Dynamo's graphs, traced again: what is lost on the way is noticed."""

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from kvmix_compile.passes.capture.dynamo import check_whole
from kvmix_compile.passes.errors import CaptureError
from tests.helpers.lowered import graphs_of

pytestmark = pytest.mark.usefixtures("dynamo_begins_anew")


def recurrence(decay: Tensor, x: Tensor) -> Tensor:
    def joined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return associative_scan(joined, (decay, x), dim=1, combine_mode="generic")[1] + 1


def test_an_associative_scan_cannot_be_traced_twice() -> None:
    (graph,) = graphs_of(recurrence, [((torch.rand(2, 7, 3), torch.rand(2, 7, 3)), {})])
    with pytest.raises(CaptureError, match=r"line \d+, in .* under torch\.vmap.* use kvmix_compile\.apply"):
        check_whole(graph)


def test_constants_of_the_model_are_no_loss() -> None:
    table = torch.rand(5)
    (graph,) = graphs_of(lambda x: (x * table + torch.tensor([1.0, 2, 3, 4, 5])).relu(), [((torch.rand(3, 5),), {})])
    check_whole(graph)
