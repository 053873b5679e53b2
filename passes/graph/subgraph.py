"""Subgraph: some nodes of a graph as a function of its inputs, to be run without the rest."""

from collections.abc import Sequence

from torch import fx
from torch._ops import OpOverload

from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation


def subgraph(module: fx.GraphModule, targets: Sequence[fx.Node], given: Sequence[fx.Node] = ()) -> fx.GraphModule:
    """A module of `module`'s inputs, in their order, followed by values for the nodes `given`; it returns a tuple of
    the targets.

    Raises UnsupportedModelError where that would write to something in place.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    wanted = _ancestors_until(targets, set(given))
    for node in graph_inputs(module.graph):
        copies[node] = graph.placeholder(node.name)
    for node in given:
        copies[node] = graph.placeholder(f"given_{node.name}")
    for node in module.graph.nodes:
        if node in wanted and node not in copies:
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
                raise UnsupportedModelError(
                    f"its masks or positions depend on {operation(node)}, which writes in place"
                )
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in targets))
    return fx.GraphModule(module, graph)


def _ancestors_until(targets: Sequence[fx.Node], cut: set[fx.Node]) -> set[fx.Node]:
    found, pending = set[fx.Node](), list(targets)
    while pending:
        node = pending.pop()
        if node not in found and node not in cut:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found
