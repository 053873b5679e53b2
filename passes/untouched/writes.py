"""Writes: what a model's forward writes to its own tensors, a rewritten graph must not.

A graph reads the live model's tensors. Where it writes to one in place, it gets a copy of its own for each run, as the
model begins each run with what is there.
"""

from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.untouched.untouched import LARGEST_STATE, is_state


def write_to_copies(module: fx.GraphModule) -> None:
    """Let the graph write to copies of the tensors that it reads by `get_attr`. In place.

    Raises CaptureError for a parameter, or a tensor that is too large to be copied in every step of decoding.
    """
    graph = module.graph
    sources: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            sources[node] = node
        for argument, is_write, is_view in _aliases(node):
            if argument in sources and is_write:
                written[sources[argument]] = None
            if argument in sources and is_view:
                sources[node] = sources[argument]
    for node in written:
        held = attrgetter(str(node.target))(module)
        if isinstance(held, nn.Parameter) or (isinstance(held, Tensor) and not is_state(held)):
            raise CaptureError(
                f"the model's forward writes to {str(node.target).partition('.')[2]}, a weight or a tensor of more "
                f"than {LARGEST_STATE >> 20} MiB; it must leave what it holds as it is"
            )
        with graph.inserting_after(node):
            copied = graph.call_function(torch.ops.aten.clone.default, (node,))
        copied.meta = dict(node.meta)
        for user in [user for user in node.users if user is not copied]:
            user.replace_input_with(node, copied)


def _aliases(node: fx.Node) -> Iterator[tuple[fx.Node, bool, bool]]:
    """The arguments of an operator that it writes to, or gives a view of."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema
    viewed = {name for returned in schema.returns if returned.alias_info for name in returned.alias_info.before_set}
    for index, parameter in enumerate(schema.arguments):
        if parameter.alias_info is None:
            continue
        argument = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name)
        for source in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(source, fx.Node):
                yield source, parameter.alias_info.is_write, bool(parameter.alias_info.before_set & viewed)
