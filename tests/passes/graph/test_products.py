"""Products: what is added within one is taken out."""

import pytest
import torch
from torch import Tensor, fx

from kvmix_compile.passes.graph.products import take_out_additions
from kvmix_compile.passes.graph.vocabulary import operation


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["matmul", "add"]),
        ({"beta": 0.5}, ["matmul", "mul", "add"]),
        ({"alpha": 2.0}, ["matmul", "mul", "add"]),
        ({"beta": 0.5, "alpha": 2.0}, ["matmul", "mul", "mul", "add"]),
        ({"beta": 0, "alpha": 2.0}, ["matmul", "mul"]),
    ],
)
def test_the_sum_is_the_same(options: dict[str, float], expected: list[str]) -> None:
    def run(added: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return torch.ops.aten.baddbmm.default(added, first, second, **options)

    given = torch.randn(2, 1, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    module = fx.symbolic_trace(run)
    take_out_additions(module.graph)
    module.recompile()
    assert [operation(node) for node in module.graph.nodes if node.op == "call_function"] == expected
    torch.testing.assert_close(module(*given), run(*given))
