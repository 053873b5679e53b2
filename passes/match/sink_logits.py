"""Sink logits: of each query head a learned score that takes part in the softmax and has no value.

A model concatenates it to the scores as a last column and drops the column after the softmax. Whatever it does in
between to keep the softmax stable shifts all scores of a query, which changes no weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.vocabulary import argument, as_node, operation, tensor_of, unarranged

# What the column is given while the scores beside it are probed: a number like no other.
PROBED_LOGIT = 0.71875


@dataclass(frozen=True)
class SinkLogits:
    """`logits`: the learned numbers, as many as there are query heads. `column` `[batch, query heads, tokens, 1]`: the
    same as the last column of the softmax's input. `scores`: what it is concatenated to.
    """

    logits: fx.Node
    column: fx.Node
    scores: fx.Node

    @classmethod
    def match(cls, products: fx.Node, softmax: fx.Node, dataflow: Dataflow, layer: str) -> Self | None:
        """What is concatenated to the scores between these two nodes, if anything is."""
        between = dataflow.between(products, softmax)
        joins = [node for node in between if operation(node) == "cat"]
        if not joins:
            return None
        parts = joins[0].args[0]
        axis = argument(joins[0], 1, "dim", 0)
        is_last = axis in (-1, len(joins[0].meta["val"].shape) - 1)
        if len(joins) > 1 or not isinstance(parts, list | tuple) or len(parts) != 2 or not is_last:
            raise not_understood(layer)
        scores, column = (as_node(part) for part in parts)
        logits = unarranged(column)
        if column in dataflow.token_dependent or logits.op not in ("get_attr", "placeholder"):
            raise not_understood(layer)
        return cls(logits, column, scores)

    def check(self, module: fx.GraphModule, known: Mapping[fx.Node, Any], query_heads: int, layer: str) -> None:
        """Raise UnsupportedModelError unless the column is each head's own number, seen with the inputs `known`."""
        logits, column = (evaluate(module, node, known) for node in (self.logits, self.column))
        if logits.numel() != query_heads or not torch.equal(
            column, logits.view(1, -1, 1, 1).to(column).expand_as(column)
        ):
            raise not_understood(layer)

    def dropped_by(self, node: fx.Node) -> bool:
        """Whether `node` drops the last column of what it is given."""
        value = tensor_of(node)
        return (
            operation(node) == "slice"
            and value is not None
            and argument(node, 1, "dim", 0) in (-1, value.dim() - 1)
            and argument(node, 2, "start") in (None, 0)
            and argument(node, 3, "end") == -1
            and argument(node, 4, "step", 1) == 1
        )


def without_column(scores: Tensor) -> Tensor:
    """The scores for which the softmax's last column would be PROBED_LOGIT, without that column.

    scores: float `[.., tokens, tokens + 1]`, shifted by any number for each query.
    """
    return scores[..., :-1] - scores[..., -1:] + PROBED_LOGIT


def not_understood(layer: str) -> UnsupportedModelError:
    """The error for a column beside the scores that is no sink logit."""
    return UnsupportedModelError(
        f"{layer}: what it concatenates to its attention scores is not a learned number for each head that is dropped "
        "after the softmax"
    )
