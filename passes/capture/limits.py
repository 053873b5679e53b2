"""Limits: how many token ids and positions a graph can take, read off the tables that it looks them up in."""

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.position_tables import reads_table
from kvmix_compile.passes.graph.source_lines import line_of_bound
from kvmix_compile.passes.graph.vocabulary import argument, as_node, behind_layout, operation, tensor_of

# What numbers tokens.
COUNTING = frozenset({"arange", "cumsum"})


def vocabulary_size(graph: fx.Graph, input_ids: fx.Node) -> int:
    """As Captured.vocabulary."""
    rows = [_rows(node) for node in _embeddings(graph) if input_ids in behind_layout(as_node(node.args[1]))]
    return min(rows) if rows else int(_logits(graph).shape[-1])


def longest_context(
    graph: fx.Graph, dataflow: Dataflow, tokens: torch.SymInt, configured: object, most_tokens: int | None
) -> int | None:
    """As Captured.longest_context. `configured`: what the model's configuration says, if it does; `most_tokens`: for
    how many export's graph holds.
    """
    tables = _position_tables(graph, dataflow, tokens)
    if most_tokens is not None and most_tokens not in {configured, *tables}:
        raise CaptureError(
            f"the model's forward takes another path for a sequence beyond {most_tokens}, at {line_of_bound(tokens)}; "
            "kvmix_compile needs one graph that serves every length"
        )
    if isinstance(configured, int):
        return min([configured, *([most_tokens] if most_tokens else [])])
    return min(tables, default=None)


def _position_tables(graph: fx.Graph, dataflow: Dataflow, tokens: torch.SymInt) -> list[int]:
    """The rows of each table that is looked up or cut by position."""
    token_dependent = dataflow.token_dependent
    # What depends on neither tokens nor positions is looked up at a constant, such as the type of a segment.
    looked_up = [
        _rows(node)
        for node in _embeddings(graph)
        if node.args[1] not in token_dependent and _depends_on_positions(as_node(node.args[1]), dataflow)
    ]
    cut = [
        node.all_input_nodes[0].meta["val"].shape[argument(node, 1, "dim", 0)]
        for node in graph.nodes
        if node not in token_dependent and (reads_table(node, tokens) or _reads_end_of_table(node, tokens))
    ]
    return looked_up + [rows for rows in cut if isinstance(rows, int)]


def _reads_end_of_table(node: fx.Node, tokens: torch.SymInt) -> bool:
    """`table[max(0, rows - tokens):]`: as many of its last rows as there are tokens."""
    start = argument(node, 2, "start")
    if operation(node) != "slice" or not isinstance(start, fx.Node):
        return False
    rows = node.all_input_nodes[0].meta["val"].shape[argument(node, 1, "dim", 0)]
    return isinstance(rows, int) and statically_known_true(start.meta["val"] == torch.sym_max(0, rows - tokens))


def _depends_on_positions(index: fx.Node, dataflow: Dataflow) -> bool:
    return any(
        operation(node) in COUNTING or (node.op == "placeholder" and node.name == "position_ids")
        for node in dataflow.ancestors(index) | {index}
    )


def _embeddings(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if operation(node) == "embedding"]


def _rows(embedding: fx.Node) -> int:
    table = tensor_of(embedding.args[0])
    assert table is not None
    return int(table.shape[0])


def _logits(graph: fx.Graph) -> Tensor:
    output = next(node for node in graph.nodes if node.op == "output")
    logits: Tensor = output.all_input_nodes[0].meta["val"]
    return logits
