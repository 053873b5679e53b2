"""Plain: a graph as data that can be kept in a file, without the values that its nodes were traced with."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class NodeName:
    """Stands for a node in the arguments of another."""

    name: str


@dataclass(frozen=True)
class OperatorName:
    """Stands for one of PyTorch's operators, such as aten.view.default."""

    name: str


@dataclass(frozen=True)
class PlainNode:
    """What makes a node, as torch.fx.Node has it. target: a function, the name of an attribute or input, or an
    OperatorName.
    """

    kind: str
    name: str
    target: Any
    args: Any
    kwargs: Any


def as_plain(graph: fx.Graph) -> tuple[PlainNode, ...]:
    """A graph's nodes, in their order."""
    return tuple(
        PlainNode(node.op, node.name, _named(node.target), _without_nodes(node.args), _without_nodes(dict(node.kwargs)))
        for node in graph.nodes
    )


def as_graph(nodes: Iterable[PlainNode]) -> fx.Graph:
    """The graph again."""
    graph, known = fx.Graph(), dict[str, fx.Node]()

    def with_nodes(arguments: Any) -> Any:
        return map_aggregate(arguments, lambda held: known[held.name] if isinstance(held, NodeName) else held)

    for node in nodes:
        args, kwargs = with_nodes(node.args), with_nodes(node.kwargs)
        known[node.name] = graph.create_node(node.kind, _found(node.target), args, kwargs, node.name)
    return graph


def _without_nodes(arguments: Any) -> Any:
    def named(held: Any) -> Any:
        return NodeName(held.name) if isinstance(held, fx.Node) else held

    return map_aggregate(arguments, named)


def _named(target: Any) -> Any:
    return OperatorName(str(target)) if isinstance(target, OpOverload) else target


def _found(target: Any) -> Any:
    return reduce(getattr, target.name.split("."), torch.ops) if isinstance(target, OperatorName) else target
