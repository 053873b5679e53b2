"""Spread heads: of a model whose weights are spread over processes, whether each has heads of its own at a site."""

from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.distributed.tensor import DTensor

from kvmix_compile.passes.capture.captured import MODEL, Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.match.projections import find_projection, is_projection
from kvmix_compile.passes.match.sites import AttentionSite


def check_heads_are_spread(captured: Captured, sites: Sequence[AttentionSite]) -> None:
    """Raise UnsupportedModelError, naming the layer, where processes do not each have keys and values of heads of their
    own: where they come from weights of which each has all, or are exchanged behind them.
    """
    if captured.ranks.count == 1:
        return
    for site in sites:
        if site.values_are_keys or not all(_is_spread(node, captured) for node in (site.key, site.value)):
            raise UnsupportedModelError(
                f"{site.layer}: its keys and values are not spread over the {captured.ranks.count} processes by heads, "
                "which is not supported: load the model on one device, or with a tp_plan that has k_proj and v_proj "
                "'colwise'"
            )


def _is_spread(node: fx.Node, captured: Captured) -> bool:
    dataflow = captured.dataflow
    projection = find_projection(node, dataflow)
    if projection is None:
        return False
    behind = dataflow.tokens_behind(node, through=lambda other: not is_projection(other, dataflow))
    is_exchanged = any(other.target is torch.ops._c10d_functional.wait_tensor.default for other in behind)
    weights = [source for source in projection.output.all_input_nodes if source.op == "get_attr"]
    return not is_exchanged and any(_is_part(str(weight.target), captured.original) for weight in weights)


def _is_part(target: str, model: nn.Module) -> bool:
    """Whether of a parameter, named as the graph does, each process has a part only."""
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(target.removeprefix(f"{MODEL}."))
    return isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel()
