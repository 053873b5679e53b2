"""Positions: a model that counts its positions itself, from zero, is made to count on from the tokens already
in the cache.
"""

from operator import attrgetter

import torch
from torch import fx, ops
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.moves import OnDevices, device_of
from kvmix_compile.passes.graph.position_tables import reads_table
from kvmix_compile.passes.graph.vocabulary import as_node, graph_inputs, operation


def shift_positions(graph: fx.Graph, counts: fx.Node, device: torch.device, tokens: object) -> bool:
    """Shift every `arange(tokens)`, and every table read as `table[:tokens]`, by the first number in `counts`, int64
    `[batch]` or `[batch, tokens]` on this device. In place.

    A single shift serves all rows: the first position must be the same in each. Returns whether anything was shifted.
    """
    dataflow = Dataflow(graph)
    counters = [node for node in graph.nodes if _counts_tokens(node, tokens)]
    tables = [
        node
        for node in graph.nodes
        if reads_table(node, tokens)
        and node not in dataflow.token_dependent
        and not _is_constant(as_node(node.args[0]))
    ]
    if not counters and not tables:
        return False
    with graph.inserting_after(graph_inputs(graph)[-1]):
        flat = graph.call_function(ops.aten.reshape.default, (counts, [-1]))
    with graph.inserting_after(flat):
        past = OnDevices(graph.call_function(ops.aten.select.int, (flat, 0, 0)), device)
    for node in counters:
        with graph.inserting_after(node):
            shifted = graph.call_function(ops.aten.add.Tensor, (node, past.on(device_of(node))))
        node.replace_all_uses_with(shifted, delete_user_cb=lambda user, shifted=shifted: user is not shifted)
    for node in tables:
        table, axis, end = node.args[0], node.args[1], as_node(node.args[3])
        with graph.inserting_before(node):
            index = graph.call_function(ops.aten.arange.default, (end,), {"device": device_of(node)})
            index = graph.call_function(ops.aten.add.Tensor, (index, past.on(device_of(node))))
            read = graph.call_function(ops.aten.index_select.default, (table, axis, index))
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    return True


def _counts_tokens(node: fx.Node, tokens: object) -> bool:
    """`arange(tokens)`: one number for each new token, from zero."""
    if operation(node) != "arange":
        return False
    return statically_known_true(node.meta["val"].shape[0] == tokens)


def _is_constant(table: fx.Node) -> bool:
    """Whether it is a table of the same whole number for every position, such as the segment that all tokens are of."""
    if table.op != "get_attr" or table.meta["val"].dtype is not torch.int64:
        return False
    values = attrgetter(str(table.target))(table.graph.owning_module)
    return bool((values == values.flatten()[0]).all())
