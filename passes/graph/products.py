"""Products: what is added within a matrix product is taken out of it, so that matchers see one spelling."""

from typing import Any

from torch import fx, ops

from kvmix_compile.passes.graph.vocabulary import argument, operation


def take_out_additions(graph: fx.Graph) -> None:
    """Each `baddbmm(added, a, b)` becomes `alpha * (a @ b) + beta * added`. In place."""
    for node in list(graph.nodes):
        if operation(node) == "baddbmm":
            with graph.inserting_before(node):
                node.replace_all_uses_with(_sum(graph, node))
            graph.erase_node(node)


def _sum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    added, *factors = node.args[:3]
    beta, alpha = (argument(node, 3 + index, name, 1) for index, name in enumerate(("beta", "alpha")))
    product = graph.call_function(ops.aten.bmm.default, tuple(factors))
    product.meta = dict(node.meta)
    total = _times(graph, product, alpha)
    if beta == 0:  # what is added is then not even looked at
        return total
    assert isinstance(added, fx.Node)
    total = graph.call_function(ops.aten.add.Tensor, (total, _times(graph, added, beta)))
    total.meta = dict(node.meta)
    return total


def _times(graph: fx.Graph, node: fx.Node, factor: Any) -> fx.Node:
    if factor == 1:
        return node
    scaled = graph.call_function(ops.aten.mul.Tensor, (node, factor))
    scaled.meta = dict(node.meta)
    return scaled
