"""Projections: the linear maps that keys and values come from, found by walking back from a site."""

from dataclasses import dataclass

from torch import fx

from kvmix_compile.passes.dataflow import Dataflow
from kvmix_compile.passes.vocabulary import PROJECTIONS, operation


@dataclass(frozen=True)
class Projection:
    """A linear map with weights. `input` `[.., features in]` and `output` `[.., features out]`; of a fused
    projection, keys or values use some of the output features.
    """

    input: fx.Node
    output: fx.Node


def find_projection(node: fx.Node, dataflow: Dataflow) -> Projection | None:
    """The nearest linear map behind keys or values, or None where there is not exactly one."""
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
    return found[0] if len(found) == 1 else None
