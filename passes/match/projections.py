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
    found: list[Projection] = []
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen or current not in dataflow.token_dependent:
            continue
        seen.add(current)
        inputs = [source for source in current.all_input_nodes if source in dataflow.token_dependent]
        if operation(current) in PROJECTIONS and len(inputs) == 1:
            found.append(Projection(inputs[0], current))
        else:
            pending.extend(inputs)
    whole = [one for one in found if all(_adapts(other, one, dataflow) for other in found if other is not one)]
    return whole[0] if len(whole) == 1 else None


def _adapts(projection: Projection, whole: Projection, dataflow: Dataflow) -> bool:
    """Whether `projection` gives as many features as `whole`, from an earlier linear map of the same input."""
    node = projection.input
    while node is not whole.input and operation(node) in PROJECTIONS | LINEAR:
        node = next(source for source in node.all_input_nodes if source in dataflow.token_dependent)
    return node is whole.input and node is not projection.input and _features(projection) == _features(whole)


def _features(projection: Projection) -> int:
    return int(projection.output.meta["val"].shape[-1])
