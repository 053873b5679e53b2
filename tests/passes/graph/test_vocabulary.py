"""Vocabulary: one name for an operation in ATen graphs and in torch-level graphs."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kvmix_compile.passes.graph.vocabulary import argument, is_active_dropout, operation, tensor_of

SPELLINGS: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (lambda x: x + 1, ["add"]),
    (lambda x: torch.add(x, 1), ["add"]),
    (lambda x: x.add(1), ["add"]),
    (lambda x: x - 1, ["sub"]),
    (lambda x: torch.subtract(x, 1), ["sub"]),
    (lambda x: x * 2, ["mul"]),
    (lambda x: torch.multiply(x, 2), ["mul"]),
    (lambda x: x / 2, ["div"]),
    (lambda x: torch.true_divide(x, 2), ["div"]),
    (lambda x: x.divide(2), ["div"]),
    (lambda x: x @ x.transpose(1, 2), ["transpose", "matmul"]),
    (lambda x: torch.matmul(x, x.swapaxes(1, 2)), ["transpose", "matmul"]),
    (lambda x: torch.bmm(x, x.transpose(1, 2)), ["transpose", "matmul"]),
    (lambda x: F.softmax(x, dim=-1), ["softmax"]),
    (lambda x: torch.softmax(x, -1), ["softmax"]),
    (lambda x: x.softmax(-1), ["softmax"]),
    (lambda x: x.double(), ["to"]),
    (lambda x: x.to(torch.float64), ["to"]),
    (lambda x: x.half().float(), ["to", "to"]),
    (lambda x: x.masked_fill(x > 0, 0.0), ["gt", "masked_fill"]),
    (lambda x: torch.tanh(x), ["tanh"]),
    (lambda x: x.permute(0, 2, 1), ["permute"]),
    (lambda x: F.scaled_dot_product_attention(x, x, x), ["scaled_dot_product_attention"]),
    (lambda x: (x > 0) & (x < 1), ["gt", "lt", "and"]),
    (lambda x: torch.logical_and(x > 0, x < 1), ["gt", "lt", "and"]),
]


class Spelled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def calls(graph: fx.Graph) -> list[fx.Node]:
    """What is computed, without the checks that export adds."""
    return [node for node in graph.nodes if node.op.startswith("call") and not node.name.startswith("_assert")]


def graphs(function: Callable[[Tensor], Tensor]) -> dict[str, fx.Graph]:
    """The function as ATen and as torch-level operations."""
    module = Spelled(function)
    return {
        "aten": torch.export.export(module, (torch.randn(2, 3, 3),)).graph,
        "torch": fx.symbolic_trace(module).graph,
    }


@pytest.mark.parametrize(("function", "names"), SPELLINGS)
def test_each_spelling_has_the_same_name_on_both_levels(function: Callable, names: list[str]) -> None:
    for level, graph in graphs(function).items():
        assert [operation(node) for node in calls(graph)] == names, level


def test_what_is_no_call_has_its_kind_for_a_name() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert operation(node) == "placeholder"
    assert operation(graph.get_attr("weight")) == "get_attr"
    assert operation(graph.output(node)) == "output"
    assert operation(graph.call_function(torch.ops.aten.add, (node, 1))) == "add"
    assert operation(graph.call_function(operator.truediv, (node, 2))) == "div"


def test_arguments_are_found_by_position_and_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for node in (graph.call_function(torch.sum, (x, 1)), graph.call_function(torch.sum, (x,), {"dim": 1})):
        assert argument(node, 1, "dim") == 1
    assert argument(graph.call_function(torch.sum, (x,)), 1, "dim", "all") == "all"


@pytest.mark.parametrize(
    ("probability", "training", "active"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)]
)
def test_dropout_drops_only_in_training(probability: float, training: bool, active: bool) -> None:
    for level, graph in graphs(lambda x: F.dropout(x, probability, training)).items():
        assert [is_active_dropout(node) for node in calls(graph)] == [active], level
    assert not any(is_active_dropout(node) for node in calls(graphs(torch.tanh)["aten"]))


def test_the_tensor_of_a_node_is_its_example() -> None:
    (node,) = calls(graphs(lambda x: x.transpose(0, 1))["aten"])
    example = tensor_of(node)
    assert example is not None and example.shape == (3, 2, 3)
    assert tensor_of(calls(graphs(torch.tanh)["torch"])[0]) is None and tensor_of(3) is None
