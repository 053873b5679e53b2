"""Limits: how many token ids and positions a graph can take, read off the tables that it looks them up in."""

from torch import Tensor, fx

from kvmix_compile.passes.capture import Captured
from kvmix_compile.passes.dataflow import Dataflow
from kvmix_compile.passes.vocabulary import operation, tensor_of


def vocabulary_size(captured: Captured) -> int:
    """The number of token ids that the graph can embed."""
    tokens = captured.placeholder("input_ids")
    rows = [_rows(node) for node in _embeddings(captured.graph) if tokens in _index_sources(node)]
    return min(rows) if rows else int(_logits(captured.graph).shape[-1])


def longest_context(captured: Captured) -> int | None:
    """How many positions the model has: what its configuration says, or the rows of its position table.

    None: no limit found.
    """
    config = getattr(captured.model, "config", None)
    configured = getattr(config, "max_position_embeddings", None)
    if isinstance(configured, int):
        return configured
    token_dependent = Dataflow(captured.graph).token_dependent
    rows = [_rows(node) for node in _embeddings(captured.graph) if node.args[1] not in token_dependent]
    return min(rows) if rows else None


def _embeddings(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if operation(node) == "embedding"]


def _rows(embedding: fx.Node) -> int:
    table = tensor_of(embedding.args[0])
    assert table is not None
    return int(table.shape[0])


def _index_sources(embedding: fx.Node) -> set[fx.Node]:
    """The node that an embedding looks up, and those behind it through views."""
    found, node = set(), embedding.args[1]
    while isinstance(node, fx.Node):
        found.add(node)
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return found


def _logits(graph: fx.Graph) -> Tensor:
    output = next(node for node in graph.nodes if node.op == "output")
    logits: Tensor = output.all_input_nodes[0].meta["val"]
    return logits
