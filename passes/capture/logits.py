"""Logits: only those asked for are computed, also where the model computes all.

A model without `logits_to_keep` ends in `logits[:, positions]`. The selection commutes with everything that treats
each token alone, so it is moved up in front of the vocabulary projection: a long prompt never has all its logits in
memory.
"""

import torch
from torch import fx, ops

from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.vocabulary import LAYOUT, PROJECTIONS, as_node, operation, tensor_of

# Operations that leave the token dimension alone when their other arguments do not depend on tokens.
_POINTWISE = frozenset({"linear", "mul", "div", "add", "sub", "tanh", "to", "layer_norm", "rms_norm"})


# Operations that give the dtype of their only tensor.
_KEEPING_DTYPE = LAYOUT - {"to", "index"} | {"mul", "div", "tanh"}


def select_early(graph: fx.Graph) -> None:
    """Move the selection of logit positions at the end of the graph up as far as it commutes. In place."""
    output = next(node for node in graph.nodes if node.op == "output")
    selection = as_node(output.args[0])
    if operation(selection) != "index":
        return
    source, indices = as_node(selection.args[0]), selection.args[1]
    token_dependent = Dataflow(graph).token_dependent
    while _commutes(source, token_dependent):
        (inner,) = (node for node in source.all_input_nodes if node in token_dependent)
        with graph.inserting_before(source):
            selected = graph.call_function(ops.aten.index.Tensor, (inner, indices))
            selected.meta = {"val": inner.meta["val"][:, : selection.meta["val"].shape[1]]}
        source.replace_input_with(inner, selected)
        source.meta = source.meta | {"val": selection.meta["val"]}
        selection.replace_all_uses_with(source)
        graph.erase_node(selection)
        selection, source = selected, inner


def follow_autocast(graph: fx.Graph) -> bool:
    """Whether autocast around the model would give its logits in autocast's dtype: they are a linear map's, scaled or
    capped at most, and not converted.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    node = as_node(output.args[0])
    logits = tensor_of(node)
    # Autocast leaves float64 alone.
    if logits is None or logits.dtype == torch.float64:
        return False
    while operation(node) in _KEEPING_DTYPE and sum(source in node.args for source in node.all_input_nodes) == 1:
        node = as_node(node.args[0])
    return operation(node) in PROJECTIONS


def _commutes(node: fx.Node, token_dependent: frozenset[fx.Node]) -> bool:
    """Whether selecting tokens of the node's input gives the same as selecting them of its output, `[batch,
    tokens, ..]` both.
    """
    if operation(node) not in _POINTWISE or len(node.users) != 1:
        return False
    inputs = [source for source in node.all_input_nodes if source in token_dependent]
    others = [source for source in node.all_input_nodes if source not in token_dependent]
    same_rank = len(inputs) == 1 and inputs[0].meta["val"].dim() == node.meta["val"].dim() == 3
    return same_rank and all(source.op == "get_attr" and source.meta["val"].dim() <= 2 for source in others)
