"""Moves: what a graph moves from one device to another it moves once.

A model that is spread over devices moves whatever each of its layers is given to the device of that layer, once for
each layer: rotary tables and masks too.
"""

import torch
from torch import fx, ops
from torch._ops import OpOverload

from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation, tensor_of


def share_moves(graph: fx.Graph) -> None:
    """Each value is moved to each device once, when it is first needed there, and what comes back is what it was. In
    place.
    """
    moved: dict[tuple[fx.Node, torch.device], fx.Node] = {}
    for node in list(graph.nodes):
        if not is_move(node) or _is_written(node):
            continue
        source, device = _origin(node), device_of(node)
        if _is_written(source):
            continue
        same = source if device == device_of(source) else moved.setdefault((source, device), node)
        if same is node:
            node.replace_input_with(node.all_input_nodes[0], source)
        else:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def align_indices(graph: fx.Graph) -> None:
    """Let what is indexed be indexed on its own device. In place.

    Which logits are asked for is told where the model begins, and they are computed where it ends.
    """
    for node in list(graph.nodes):
        indexed = tensor_of(node.args[0]) if operation(node) == "index" else None
        if indexed is None:
            continue
        for index in dict.fromkeys(index for index in node.args[1] if isinstance(index, fx.Node)):
            if device_of(index) not in (indexed.device, torch.device("cpu")):
                with graph.inserting_before(node):
                    node.replace_input_with(index, move(index, indexed.device))


class OnDevices:
    """What a node gives, on whichever device it is asked for: moved there once, right behind where it is made, or
    behind all inputs of the graph.
    """

    def __init__(self, node: fx.Node, device: torch.device) -> None:
        """device: where the node gives it."""
        self.node, self._moved = node, {device: node}

    def on(self, device: torch.device) -> fx.Node:
        """The node that gives it there."""
        if device not in self._moved:
            graph = self.node.graph
            behind = graph_inputs(graph)[-1] if self.node.op == "placeholder" else self.node
            with graph.inserting_after(behind):
                self._moved[device] = move(self.node, device)
        return self._moved[device]


def move(node: fx.Node, device: torch.device) -> fx.Node:
    """A new node, where the graph inserts, for what `node` gives, on another device."""
    operator = ops.aten.to.dtype_layout
    moved = node.graph.call_function(operator, (node,), {"device": device})
    value = tensor_of(node)
    if value is not None:
        moved.meta = {**node.meta, "val": operator(value, device=device)}
    return moved


def is_move(node: fx.Node) -> bool:
    """Whether a node gives what another does, on another device and otherwise the same."""
    before, after = (tensor_of(it) for it in (node.args[0] if node.args else None, node))
    if operation(node) != "to" or before is None or after is None:
        return False
    return before.device != after.device and before.dtype == after.dtype


def device_of(node: fx.Node) -> torch.device:
    """Where what a node gives lies."""
    value = tensor_of(node)
    assert value is not None, node
    return value.device


def _origin(move: fx.Node) -> fx.Node:
    """What was moved, before its first move."""
    node = move
    while is_move(node):
        node = node.all_input_nodes[0]
    return node


def _is_written(node: fx.Node) -> bool:
    """Whether something writes to what a node gives in place."""
    return any(isinstance(user.target, OpOverload) and user.target._schema.is_mutable for user in node.users)
