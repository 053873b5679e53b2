"""Device: the devices that export wrote into a graph as constants are made to follow the model."""

import torch
from torch import fx


def move_constants(module: fx.GraphModule, device: torch.device) -> None:
    """Replace every device in the graph's arguments by `device`, and move the graph's own constant tensors there.

    In place.
    """
    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda value: device if isinstance(value, torch.device) else value
        )
    for name, buffer in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, buffer.to(device), persistent=False)
    module.recompile()
