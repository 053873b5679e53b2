"""Projections: the linear maps that keys and values come from, found by walking back from a site."""

from dataclasses import dataclass

from torch import fx

from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.vocabulary import PROJECTIONS, operation

# What a low-rank adapter does between its two maps: nothing, or what is linear too.
LINEAR = frozenset({"to", "dropout", "mul", "div"})


@dataclass(frozen=True)
class Projection:
    """A linear map with weights. `input` `[.., features in]` and `output` `[.., features out]`; of a fused
    projection, keys or values use some of the output features.
    """

    input: fx.Node
    output: fx.Node


def find_projection(node: fx.Node, dataflow: Dataflow) -> Projection | None:
    """The nearest linear map behind keys or values. Of several that are added up, as a low-rank adapter is to what it
    adapts, the one that is adapted; None where there is none such.
    """
    behind = dataflow.tokens_behind(node, through=lambda other: not is_projection(other, dataflow))
    found = [Projection(_tokens_of(other, dataflow)[0], other) for other in behind if is_projection(other, dataflow)]
    whole = [one for one in found if all(_adapts(other, one, dataflow) for other in found if other is not one)]
    return whole[0] if len(whole) == 1 else None


def is_projection(node: fx.Node, dataflow: Dataflow) -> bool:
    """Whether `node` is a linear map of what depends on tokens, by what does not."""
    return operation(node) in PROJECTIONS and len(_tokens_of(node, dataflow)) == 1


def _adapts(projection: Projection, whole: Projection, dataflow: Dataflow) -> bool:
    """Whether `projection` gives as many features as `whole`, from an earlier linear map of the same input."""
    node = projection.input
    while node is not whole.input and operation(node) in PROJECTIONS | LINEAR:
        node = _tokens_of(node, dataflow)[0]
    return node is whole.input and node is not projection.input and _features(projection) == _features(whole)


def _tokens_of(node: fx.Node, dataflow: Dataflow) -> list[fx.Node]:
    """Its inputs that depend on tokens."""
    return [source for source in node.all_input_nodes if source in dataflow.token_dependent]


def _features(projection: Projection) -> int:
    return int(projection.output.meta["val"].shape[-1])
