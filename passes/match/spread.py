"""Spread heads: of a model whose weights are spread over processes, whether attention's heads are too.

Where they are, each process keeps the keys and values of some heads; where they are not, those of all. Where only the
heads of queries are, and all of them read the same row, as in multi-head latent attention, each keeps that row.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx, nn
from torch.distributed.tensor import DTensor

from kvmix_compile.passes.capture.captured import MODEL, Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.match.projections import is_projection
from kvmix_compile.passes.match.sites import AttentionSite


def with_spread_heads(captured: Captured, sites: Sequence[AttentionSite]) -> Captured:
    """The same, knowing over which ranks heads are spread.

    Raises UnsupportedModelError, naming the layer, where only some are, and they are not those of all queries, which
    read one head of keys and values.
    """
    if captured.ranks.count == 1:
        return captured
    attentions = [attention for site in sites for attention in site.attentions]
    queries = {attention.query: attention.layer for attention in attentions}
    stored = {node: attention.layer for attention in attentions for node in (attention.key, attention.value)}
    layers = {node: layer for node, layer in (queries | stored).items() if not is_spread(node, captured)}
    if not layers:
        return replace(captured, head_ranks=captured.ranks, query_ranks=captured.ranks)
    if len(layers) == len(queries | stored):
        return captured
    if layers.keys() == stored.keys() and all(site.kv_heads == 1 for site in sites):
        return replace(captured, query_ranks=captured.ranks)
    raise UnsupportedModelError(
        f"{next(iter(layers.values()))}: some heads of queries, keys and values are spread over "
        f"{captured.ranks.count} processes and others are not, which is not supported: load the model on one device"
    )


def is_spread(node: fx.Node, captured: Captured) -> bool:
    """Whether each process has other features there, made by its parts of weights; else all have the same."""
    if captured.ranks.count == 1:
        return False
    dataflow = captured.dataflow

    def is_exchanged(other: fx.Node) -> bool:
        return other.target is torch.ops._c10d_functional.wait_tensor.default

    behind = dataflow.tokens_behind(
        node, through=lambda other: not (is_exchanged(other) or is_projection(other, dataflow))
    )
    return any(
        _is_part(str(weight.target), captured.original)
        for projection in behind
        if is_projection(projection, dataflow)
        for weight in _weights(projection, dataflow)
    )


def _weights(projection: fx.Node, dataflow: Dataflow) -> set[fx.Node]:
    constant = {source for source in projection.all_input_nodes if source not in dataflow.token_dependent}
    return {node for node in constant.union(*map(dataflow.ancestors, constant)) if node.op == "get_attr"}


def _is_part(target: str, model: nn.Module) -> bool:
    """Whether of a parameter, named as the graph does, each process has a part only."""
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(target.removeprefix(f"{MODEL}."))
    return isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel()
