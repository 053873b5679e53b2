"""Dataflow: a networkx view of a graph, for questions about who feeds whom."""

from collections.abc import Callable, Iterable
from functools import cached_property

import networkx
from torch import fx

from kvmix_compile.passes.graph.vocabulary import SHAPE_ONLY, operation


class Dataflow:
    """Who feeds whom in an FX graph. A snapshot: make a new one after the graph changes."""

    def __init__(self, graph: fx.Graph, tokens: Iterable[fx.Node] | None = None) -> None:
        """`tokens`: the inputs that carry the tokens; by default the one named `input_ids`."""
        self.tokens = None if tokens is None else list(tokens)
        self.edges: networkx.DiGraph[fx.Node] = networkx.DiGraph()
        for node in graph.nodes:
            self.edges.add_node(node, operation=operation(node))
            self.edges.add_edges_from((source, node) for source in node.all_input_nodes)

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        return networkx.ancestors(self.edges, node)

    def descendants(self, node: fx.Node) -> set[fx.Node]:
        return networkx.descendants(self.edges, node)

    def between(self, first: fx.Node, last: fx.Node) -> set[fx.Node]:
        """The nodes on the ways from one to the other, without these two."""
        return self.descendants(first) & self.ancestors(last)

    def tokens_behind(self, node: fx.Node, through: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """What depends on tokens and feeds `node`, itself first, then from near to far. What feeds a node is not looked
        at where `through` is false of it.
        """
        if node not in self.token_dependent:
            return []
        open_edges = networkx.subgraph_view(
            self.edges, filter_edge=lambda source, target: source in self.token_dependent and through(target)
        )
        return [node, *(source for _, source in networkx.bfs_edges(open_edges, node, reverse=True))]

    @cached_property
    def token_dependent(self) -> frozenset[fx.Node]:
        """The nodes whose values depend on which tokens were given, not merely on how many or where."""
        by_value = networkx.subgraph_view(
            self.edges, filter_edge=lambda _, target: self.edges.nodes[target]["operation"] not in SHAPE_ONLY
        )
        inputs = self.tokens
        if inputs is None:
            inputs = [node for node in self.edges if node.op == "placeholder" and node.name == "input_ids"]
        return frozenset(inputs).union(*(networkx.descendants(by_value, node) for node in inputs))

    @cached_property
    def input_dependent(self) -> frozenset[fx.Node]:
        """The nodes whose values depend on any input of the graph, be it on its size alone."""
        inputs = [node for node in self.edges if node.op == "placeholder"]
        return frozenset(inputs).union(*(networkx.descendants(self.edges, node) for node in inputs))
