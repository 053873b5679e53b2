"""Regions: parts of a model's forward that run with gradients, or autocast, turned on or off, become plain nodes.

torch.export keeps such a part as a call of a graph of its own. Captured graphs run without gradients and without
autocast (kernels/ambient.py), so that a part for which these are turned off needs nothing else. In one for which
autocast is on, the conversions that autocast makes are written down.
"""

from typing import Any, cast

import torch
from torch import Tensor, fx, ops
from torch._ops import HigherOrderOperator
from torch.fx.node import Argument

from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.vocabulary import LAYOUT, as_node, operation, tensor_of

# Called with (is enabled, region, *inputs), and with (device, dtype, is enabled, keeps a cache, region, *inputs).
GRADIENT_REGION, AUTOCAST_REGION = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_BEFORE_REGION = {GRADIENT_REGION: 1, AUTOCAST_REGION: 4}

# Layouts of one tensor that are a tensor.
_LAYING_OUT = LAYOUT - {"to", "getitem", "index", "index_select", "split", "split_with_sizes", "chunk", "unbind"}
# What has another dtype than its input because it was asked to.
_CONVERSIONS = frozenset({"to", "view", "zeros_like", "ones_like", "empty_like", "full_like"})


def inline_regions(module: fx.GraphModule) -> None:
    """Put the nodes of each region in its place, in place.

    Raises CaptureError for any other operator that takes graphs, such as torch.cond.
    """
    for node in list(module.graph.nodes):
        if not isinstance(node.target, HigherOrderOperator):
            continue
        name = operation(node)
        if name not in _BEFORE_REGION:
            raise CaptureError(
                f"the model's forward contains {name}, which calls parts of it as functions and cannot be looked into: "
                "compute the same without it"
            )
        before, inputs = node.args[: _BEFORE_REGION[name]], node.args[_BEFORE_REGION[name] + 1 :]
        source = as_node(node.args[_BEFORE_REGION[name]])
        region = module.get_submodule(str(source.target))
        assert isinstance(region, fx.GraphModule), source
        inline_regions(region)
        if name == AUTOCAST_REGION and before[2]:
            _write_conversions(region.graph)
        _replace(node, region.graph, inputs)
        if not source.users:
            module.graph.erase_node(source)


def _replace(call: fx.Node, region: fx.Graph, inputs: tuple[Argument, ...]) -> None:
    """Copy the region's nodes in front of its call, which is erased."""
    placeholders = [node for node in region.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    results: tuple[Any, ...] = ()
    with call.graph.inserting_before(call):
        for node in region.nodes:
            if node.op == "output":
                results = tuple(copies[result] if isinstance(result, fx.Node) else result for result in node.args[0])
            elif node.op != "placeholder":
                copies[node] = call.graph.node_copy(node, lambda source: copies[source])
    for taken in list(call.users):
        taken.replace_all_uses_with(results[cast(int, taken.args[1])])
        call.graph.erase_node(taken)
    call.graph.erase_node(call)


def _write_conversions(region: fx.Graph) -> None:
    """Convert the inputs of whatever autocast gave another dtype than its inputs have. In place."""
    for node in list(region.nodes):
        result = tensor_of(node)
        if result is None or not result.is_floating_point() or operation(node) in _CONVERSIONS:
            continue
        for source in node.all_input_nodes:
            value = tensor_of(source)
            # A number in a tensor never changes the dtype of a result.
            if value is None or not value.is_floating_point() or value.dim() == 0 or value.dtype == result.dtype:
                continue
            _convert(node, source, result.dtype)


def _convert(user: fx.Node, source: fx.Node, dtype: torch.dtype) -> None:
    """Convert what `user` reads of `source`, ahead of what only lays it out for `user`: heads that are repeated, and a
    matcher looks for, are repeated behind it.
    """
    while operation(source) in _LAYING_OUT and len(source.users) == 1:
        source.meta = source.meta | {"val": _value(source).to(dtype)}
        user, source = source, as_node(source.args[0])
    with user.graph.inserting_before(user):
        converted = user.graph.call_function(ops.aten.to.dtype, (source, dtype))
    converted.meta = dict(source.meta) | {"val": _value(source).to(dtype)}
    user.replace_input_with(source, converted)


def _value(node: fx.Node) -> Tensor:
    value = tensor_of(node)
    assert value is not None, node
    return value.detach()
